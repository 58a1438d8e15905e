"""Facts about the user: name, home, preferences."""

from model.training import values, words
from model.training.memory import Kind
from model.training.wordings import wordings

NAME = Kind(
    name="name",
    value=values.name,
    weight=6,
    facts=wordings(
        """
        my name is {v} | my name is {v} | my name is {v} | I am {v} | I'm {v} | I'm {v} | I am {v}
        | [people/they/friends/my friends/my parents/most people/all/others] call me {v}
        | my name's {v} | the name is {v} | {v} is my name | I am called {v} | I'm called {v}
        | I go by [/the name ]{v} | I am [known as/named] {v} | you [can/may/should] call me {v}
        | [my first name/my full name/my real name/my given name] is {v} | I was named {v}
        """
    ),
    tell=wordings(
        """
        [Please/Just/] call me {v}[./!/] | [Hi/Hello/Hey/Good morning/], [it's/it is/this is] {v}.
        | This is {v}[/ speaking/ writing]. | [Hello/Hi], {v} here. | {v} [here/is here/speaking].
        | Remember my name: {v}. | My name: {v} | Name: {v} | You are talking to {v}.
        | [Hello/Hi/Hey][,/!] I'm {v}[, nice to meet you/. How are you/]. | I, {v}, greet you.
        """
    ),
    told="your name is {v}",
    nouns=("my name", "my name", "my first name"),
    clauses=wordings(
        """
        what my name is | who I am | what I am called | what people call me | what I'm called
        | who you are talking to | what to call me | how I am called | my name
        """
    ),
    ask=wordings(
        """
        Who am I? | Who am I? | What am I called? | What do [people/my friends] call me? | Say my
        name. | What name did I [tell/give] you? | [Who is/Who's] [talking to you/speaking/writing]?
        | [Who are you/Do you know who you are] [talking/speaking/chatting] to? | How am I called? |
        What [should/can/will/would] you call me? | Am I someone you know? | Which name do I have? |
        [Do you/Can you] [know/remember/recognise] me? | So who am I? | And who am I?
        """
    ),
    unknown="You have not told me your name yet.",
    ack="Nice to meet you, {v}!",
    change=(
        "I changed my name to {v}.",
        "Call me {v} from now on.",
        "[Please/Better] call me {v}.",
    ),
    check=wordings(
        "Is my name {v}? | Am I {v}? | Am I called {v}? | Is {v} my name? | My name is {v}, right?"
    ),
)


CITY = Kind(
    name="city",
    value=values.city,
    weight=3,
    facts=wordings(
        """
        I live in {v} | I live in {v} | I live in {v} | I'm living in {v} | I am based in {v}
        | my home is [in/] {v} | my [city/town/home town/hometown] is {v} | I am at home in {v}
        | I [currently/now/still] live in {v} | we live in {v} | {v} is where I live | I stay in {v}
        | my [house/apartment/family/place] is in {v} | I have lived in {v} for [years/a year/ages]
        | I live in [the city of/the centre of/a suburb of/the middle of/a village near] {v}
        | the [city/town/place] I live in is {v} | {v} is my [city/home/home town/town]
        """
    ),
    tell=("Greetings from {v}, my home.", "I write to you from {v}, where I live.", "Home: {v}"),
    told="you live in {v}",
    nouns=wordings("my city | my home | my town | my home town | the city I live in"),
    clauses=wordings(
        "where I live | where my home is | [which/what] [city/town] I live in | where I am at home"
    ),
    ask=wordings(
        """
        Where do I live? | Where do I live? | [What/Which] [city/town/place] do I live in? | In
        [which/what] [city/town] do I live? | Where [is/'s] my [home/house/place/apartment]? | Where
        am I living? | Where did I say I live? | Where do we live? | So where do I live? | Where do
        I live again? | [What/Which] place do I call home? | Where is home for me? | [What/Which]
        [city/town] is my home? | Where am I at home?
        """
    ),
    unknown="You have not told me where you live.",
    change=wordings(
        "I [moved/have moved/just moved/have just moved] to {v}. | I'm living in {v} these days."
    ),
    check=("Do I live in {v}?", "I live in {v}, right?", "Is {v} [my city/where I live]?"),
)


ORIGIN = Kind(
    name="origin",
    value=values.origin,
    weight=1.2,
    facts=wordings(
        """
        I am from {v} | I'm from {v} | I come from {v} | I was born in {v} | I grew up in {v} | my
        family is from {v} | I am originally from {v} | I was raised in {v} | my roots are in {v}
        """
    ),
    told="you are from {v}",
    nouns=("my origin", "my place of birth", "my birthplace"),
    clauses=wordings("where I am from | where I come from | where I was born | where I grew up"),
    ask=wordings(
        """
        Where am I from? | Where do I come from? | Where was I born? | Where did I grow up? |
        [What/Which] [city/town/place/country] [am I from/do I come from]? | Where am I
        [originally/] from?
        """
    ),
    unknown="You have not told me where you are from.",
    check=("Am I from {v}?", "Do I come from {v}?", "Was I born in {v}?"),
)


def _favourite(thing: str, words_of_it: tuple[str, ...], ask: str, weight: float) -> Kind:
    """Return the kind of fact for a favourite `thing`; `ask` are more questions for it."""
    return Kind(
        name=thing,
        value=values.one_of(words_of_it),
        weight=weight,
        facts=wordings(
            f"""
            my {{fav}} {thing} is {{v}} | my {{fav}} {thing} is {{v}} | {{v}} is my {{fav}} {thing}
            | the {thing} I [like/love] [most/best/the most] is {{v}} | my {{fav}} {thing}'s {{v}}
            | I like the {thing} {{v}} [best/most] | my best {thing} is {{v}}
            | [when it comes to {thing},/of all,] I [prefer/like] {{v}} [best/most/]
            | my {{fav}} {thing} [would be/has to be/has always been/must be/will always be] {{v}}
            | for me the best {thing} is {{v}} | there is no better {thing} than {{v}}
            """
        ),
        tell=wordings(f"My {{fav}} {thing}? [It is/It's/] {{v}}. | My {{fav}} {thing}: {{v}}"),
        told=f"your favourite {thing} is {{v}}",
        nouns=(f"my {{fav}} {thing}", f"my {{fav}} {thing}", f"the {thing} I like best"),
        clauses=wordings(f"what my {{fav}} {thing} is | which {thing} I like [best/most]"),
        ask=wordings(
            f"""
            [Which/What] {thing} do I [like/love/prefer] [best/most/the most/]?
            | [Which/What] {thing} is my {{fav}}? | [Which/What] {thing} did I say I like?
            | [Which/What] is my {{fav}} {thing}? | My best {thing}? | {ask}
            """
        ),
        unknown=f"You have not told me your favourite {thing}.",
        check=wordings(f"Is my {{fav}} {thing} {{v}}? | Is {{v}} my {{fav}} {thing}?"),
    )


COLOUR = _favourite(
    "{col}",
    words.COLOURS,
    "[What/Which] {col}[s/] do I [like/love]? | [What/Which] {col} would I choose?",
    3,
)
FOOD = _favourite(
    "food",
    words.FOODS,
    """
    What do I [like/love] to eat[ most/ best/]? | What [is/'s] my {fav} [dish/meal]?
    | [What/Which] [dish/meal] do I [like/love] best?
    """,
    2,
)


HOBBY = Kind(
    name="hobby",
    value=values.one_of(words.HOBBIES),
    weight=1.5,
    facts=wordings(
        """
        my hobby is {v} | my [{fav}/main/only/new/big/biggest] hobby is {v} | {v} is my hobby
        | in my [free/spare] time I [do/enjoy/go for/am into] {v} | my passion is {v}
        | I spend my [free time/weekends/evenings] with {v} | {v} is my [passion/{fav} hobby]
        """
    ),
    tell=("My hobby: {v}", "Hobby: {v}"),
    told="your hobby is {v}",
    nouns=("my hobby", "my hobby", "my {fav} hobby", "my passion"),
    clauses=wordings("what my hobby is | what I do in my [free/spare] time | which hobby I have"),
    ask=wordings(
        """
        What do I [do/like to do] in my [free/spare] time? | [Which/What] hobby do I have?
        | How do I spend my [free/spare] time? | What do I do for fun? | Do I have a hobby?
        """
    ),
    unknown="You have not told me your hobby.",
    check=("Is my hobby {v}?", "Is {v} my hobby?"),
)


LIKE = Kind(
    name="like",
    value=values.like,
    weight=2,
    facts=wordings(
        """
        I like {v} | I love {v} | I [really/also/just/simply] [like/love/enjoy] {v} | I enjoy {v} |
        I adore {v} | I am [a fan of/crazy about/into/keen on/mad about] {v} | {v} makes me happy |
        I can't live without {v} | I like {v} [a lot/very much] | {v} is what I like | I'm into {v}
        """
    ),
    told="you like {v}",
    nouns=("the thing I like", "what I like"),
    clauses=wordings("what I [like/love/enjoy] | what makes me happy | what I am [into/a fan of]"),
    ask=wordings(
        """
        What do I [like/love/enjoy/adore]? | What did I say I [like/love/enjoy]? | What am I [into/a
        fan of/crazy about/keen on]? | [What/Which] [thing/music/sport/game] do I [like/love]? |
        What makes me happy?
        """
    ),
    unknown="You have not told me what you like.",
    check=("Do I [like/love/enjoy] {v}?", "I like {v}, right?"),
)


DISLIKE = Kind(
    name="dislike",
    value=values.like,
    weight=0.8,
    facts=wordings(
        """
        I [hate/dislike/can't stand/don't like/do not like/never liked/detest] {v}
        | I am [no fan of/not a fan of/tired of] {v} | I really [hate/don't like] {v}
        """
    ),
    told="you do not like {v}",
    nouns=("the thing I hate",),
    clauses=wordings("what I [hate/dislike/don't like/do not like/can't stand]"),
    ask=wordings("What do I [hate/dislike/not like]? | What can't I stand? | What don't I like?"),
    unknown="You have not told me what you do not like.",
    check=("Do I [hate/dislike] {v}?",),
)


JOB = Kind(
    name="job",
    value=values.job,
    weight=2.5,
    facts=wordings(
        """
        I work as {v} | I work as {v} | I am {v} | I'm {v} | I am {v} [by profession/by trade] | I
        earn my [money/living] as {v} | my job is being {v} | I am employed as {v} | I have been {v}
        for years | I am currently {v} | I am working as {v} | I have a job as {v} | I [have
        worked/have been working/make a living] as {v} | by [profession/trade] I am {v}
        """
    ),
    tell=("My [job/profession]: [I am /I'm /]{v}.", "Job: {v}"),
    told="you work as {v}",
    nouns=wordings("my job | my job | my profession | my occupation | my line of work"),
    clauses=wordings(
        "what my job is | what I do for a living | what I work as | what my [profession/work] is"
    ),
    ask=wordings(
        """
        What do I do for a living? | What do I work as? | What do I do? | What work do I do?
        | What kind of [work/job] do I [do/have]? | [Which/What] job do I have?
        | How do I earn my [money/living]? | As what do I work? | What am I by profession?
        """
    ),
    unknown="You have not told me your job.",
    change=("I have a new job: I am {v}.", "I [changed jobs/switched jobs] and am {v} now."),
    check=("Do I work as {v}?", "Am I {v}?", "Is it true that I work as {v}?"),
)


AGE = Kind(
    name="age",
    value=values.age,
    weight=2,
    facts=wordings(
        """
        I am {v} years old | I'm {v} years old | I am {v} | I'm {v} | my age is {v}
        | I [turned/just turned/have turned] {v} | I am {v} years of age | I am aged {v}
        | I [will be/became/am going to be] {v} [this year/this month/soon/today]
        """
    ),
    tell=("Age: {v}", "My age: {v}."),
    told="you are {v} years old",
    nouns=("my age", "my age"),
    clauses=wordings("how old I am | what my age is | my age | how many years old I am"),
    ask=wordings(
        """
        How old am I? | How old am I [now/again/exactly]? | How many years old am I?
        | [Which/What] age am I? | What age did I [say/tell you]? | How old did I say I was?
        """
    ),
    unknown="You have not told me how old you are.",
    check=("Am I {v} years old?", "Am I {v}?", "Is my age {v}?"),
)
