"""What a user tells about himself: his name, where he lives, what he likes."""

from model.training import values, words
from model.training.memory import Kind
from model.training.wordings import wordings

NAME = Kind(
    name="name",
    value=values.name,
    weight=5,
    tell=wordings(
        """
        My name is {v}. | My name is {v}. | I am {v}. | I'm {v}. | I am {v}. | I'm {v}.
        | Call me {v}. | Hi, I'm {v}.
        | Hello, my name is {v}. | Hi, my name is {v}. | Hello, I am {v}. | This is {v}.
        | You can call me {v}. | The name is {v}. | People call me {v}. | {v} is my name.
        | Hi! My name is {v}! | Remember that my name is {v}. | Please call me {v}.
        | My name's {v}. | It's {v}. | Hey, it's {v}. | Good morning, I am {v}.
        | Remember my name: {v}.
        """
    ),
    ack=("Nice to meet you, {v}!",),
    ask=wordings(
        """
        What is my name? | What's my name? | Who am I? | Do you know my name?
        | Do you remember my name? | Tell me my name. | What am I called?
        | Can you tell me my name? | What did I say my name was? | What is my name again?
        | Do you know who I am? | Do you remember who I am? | Say my name. | My name?
        | And what is my name? | So what's my name? | What name did I tell you? | And my name?
        | Do you still know my name? | Have I told you my name? | Who are you talking to?
        """
    ),
    answer="Your name is {v}.",
    unknown="You have not told me your name yet.",
    summary="your name is {v}",
    update=wordings(
        """
        Actually, my name is {v}. | No, my name is {v}. | My name is now {v}.
        | I changed my name to {v}. | Sorry, my name is {v}. | My real name is {v}.
        | Actually my name is {v}. | Call me {v} from now on.
        """
    ),
    check=("Is my name {v}?", "Am I {v}?", "My name is {v}, right?"),
)


CITY = Kind(
    name="city",
    value=values.city,
    weight=3,
    tell=wordings(
        """
        I live in {v}. | I live in {v}. | My city is {v}. | I live in {v} now.
        | My home is in {v}. | I am living in {v}. | I'm living in {v}. | My home town is {v}.
        | By the way, I live in {v}. | I have lived in {v} for years. | I live in the city of {v}.
        | We live in {v}.
        """
    ),
    ack=("Okay, you live in {v}.",),
    ask=wordings(
        """
        Where do I live? | Where do I live? | What city do I live in? | Which city do I live in?
        | In which city do I live? | Where is my home? | Do you know where I live?
        | What is my city? | Do you remember where I live? | What's my city?
        | Which city is my home? | Where do I live again? | Tell me where I live.
        | What town do I live in? | Where did I say I live? | My city? | What town am I in?
        """
    ),
    answer="You live in {v}.",
    unknown="You have not told me where you live.",
    summary="you live in {v}",
    update=wordings(
        """
        I moved to {v}. | Now I live in {v}. | Actually, I live in {v}.
        | I have just moved to {v}. | No, I live in {v}. | I live in {v} now.
        """
    ),
    check=("Do I live in {v}?", "I live in {v}, right?"),
)


ORIGIN = Kind(
    name="origin",
    value=values.city,
    weight=1,
    tell=(
        "I am from {v}.",
        "I'm from {v}.",
        "I come from {v}.",
        "I was born in {v}.",
        "I grew up in {v}.",
    ),
    ack=("Okay, you are from {v}.",),
    ask=wordings(
        """
        Where am I from? | Where do I come from? | Do you know where I am from?
        | Where was I born? | What city am I from? | Where did I grow up?
        """
    ),
    answer="You are from {v}.",
    unknown="You have not told me where you are from.",
    summary="you are from {v}",
    update=("Actually, I am from {v}.", "No, I'm from {v}."),
    check=("Am I from {v}?",),
)


COLOUR = Kind(
    name="colour",
    value=values.one_of(words.COLOURS),
    weight=3,
    tell=wordings(
        """
        My {fav} {col} is {v}. | My {fav} {col} is {v}. | I like the {col} {v} best.
        | My {fav} {col}? It is {v}. | {v} is my {fav} {col}. | The {col} I like most is {v}.
        | My best {col} is {v}. | Remember that my {fav} {col} is {v}. | My {fav} {col}: {v}
        """
    ),
    ack=("Okay, your favourite colour is {v}.",),
    ask=wordings(
        """
        What is my {fav} {col}? | What's my {fav} {col}? | What is my {fav} {col}?
        | Which {col} do I like best? | What {col} do I like? | Which {col} is my {fav}?
        | Do you know my {fav} {col}? | Do you remember my {fav} {col}? | Tell me my {fav} {col}.
        | What was my {fav} {col}? | What {col} did I say I like? | My {fav} {col}?
        | What {col} is my {fav}?
        """
    ),
    answer="Your favourite colour is {v}.",
    unknown="You have not told me your favourite colour.",
    summary="your favourite colour is {v}",
    update=wordings(
        """
        Actually, my {fav} {col} is {v}. | Now my {fav} {col} is {v}. | My {fav} {col} is now {v}.
        | No, my {fav} {col} is {v}.
        """
    ),
    check=("Is my {fav} {col} {v}?",),
)


FOOD = Kind(
    name="food",
    value=values.one_of(words.FOODS),
    weight=1.5,
    tell=wordings(
        """
        My {fav} food is {v}. | My {fav} dish is {v}. | My {fav} food is {v}.
        | Best food ever: {v}.
        """
    ),
    ack=("Okay, your favourite food is {v}.",),
    ask=wordings(
        """
        What is my {fav} food? | What's my {fav} food? | What is my {fav} dish?
        | Which food do I like best? | Do you remember my {fav} food? | Do you know my {fav} food?
        | What do I like to eat?
        """
    ),
    answer="Your favourite food is {v}.",
    unknown="You have not told me your favourite food.",
    summary="your favourite food is {v}",
    update=(
        "Actually, my {fav} food is {v}.",
        "My {fav} food is now {v}.",
        "No, my {fav} food is {v}.",
    ),
    check=("Is my {fav} food {v}?",),
)


HOBBY = Kind(
    name="hobby",
    value=values.one_of(words.HOBBIES),
    weight=1.5,
    tell=wordings(
        """
        My hobby is {v}. | My {fav} hobby is {v}. | In my free time I do {v}.
        | My main hobby is {v}. | My hobby: {v}.
        """
    ),
    ack=("Okay, your hobby is {v}.",),
    ask=wordings(
        """
        What is my hobby? | What's my hobby? | What is my {fav} hobby?
        | What do I do in my free time? | Do you remember my hobby? | Which hobby do I have?
        | Do you know my hobby?
        """
    ),
    answer="Your hobby is {v}.",
    unknown="You have not told me your hobby.",
    summary="your hobby is {v}",
    update=("Actually, my hobby is {v}.", "My new hobby is {v}.", "My hobby is now {v}."),
    check=("Is my hobby {v}?",),
)


LIKE = Kind(
    name="like",
    value=values.like,
    weight=1.5,
    tell=("I like {v}.", "I love {v}.", "I really like {v}.", "I really love {v}.", "I enjoy {v}."),
    ack=("Okay, you like {v}.",),
    ask=wordings(
        """
        What do I like? | What do I love? | What did I say I like? | Do you know what I like?
        | Do you remember what I like? | What do I enjoy?
        """
    ),
    answer="You like {v}.",
    unknown="You have not told me what you like.",
    summary="you like {v}",
    check=("Do I like {v}?",),
)


JOB = Kind(
    name="job",
    value=values.job,
    weight=2,
    tell=wordings(
        """
        I work as {v}. | I am {v}. | I'm {v}. | I am {v} by profession. | My job: I am {v}.
        | I earn my money as {v}. | I work as {v}.
        """
    ),
    ack=("Okay, you work as {v}.",),
    ask=wordings(
        """
        What is my job? | What's my job? | What do I do for a living? | What do I work as?
        | Do you know my job? | What is my profession? | Do you remember my job? | What do I do?
        | What kind of work do I do?
        """
    ),
    answer="You work as {v}.",
    unknown="You have not told me your job.",
    summary="you work as {v}",
    update=("Now I work as {v}.", "Actually, I work as {v}.", "I have a new job: I am {v}."),
    check=("Do I work as {v}?", "Am I {v}?"),
)


AGE = Kind(
    name="age",
    value=values.age,
    weight=2,
    tell=wordings(
        """
        I am {v} years old. | I'm {v} years old. | I am {v}. | I'm {v}. | My age is {v}.
        | I turned {v} today.
        """
    ),
    ack=("Okay, you are {v} years old.",),
    ask=wordings(
        """
        How old am I? | What is my age? | What's my age? | Do you know how old I am?
        | How old am I now? | Do you remember my age? | Tell me my age.
        """
    ),
    answer="You are {v} years old.",
    unknown="You have not told me how old you are.",
    summary="you are {v} years old",
    update=("Actually, I am {v} years old.", "I am {v} now.", "No, I'm {v}.", "I turned {v}."),
    check=("Am I {v} years old?", "Am I {v}?"),
)
