"""What a user tells about his pets, relatives and things, and what he wants to be remembered."""

from model.training import values, words
from model.training.memory import Kind
from model.training.wordings import wordings

PET = Kind(
    name="pet",
    value=values.pet,
    weight=4,
    subjects=words.PETS,
    tell=wordings(
        """
        My {k} is called {v}. | My {k} is called {v}. | My {k}'s name is {v}.
        | I have a {k} called {v}. | I have a {k} named {v}. | The name of my {k} is {v}.
        | I have a {k} and its name is {v}. | My {k} is named {v}.
        | I have a {k}. His name is {v}. | I have a {k}. Her name is {v}.
        | I have a {k} and his name is {v}. | I got a {k}, {v}. | We have a {k} called {v}.
        | {v} is my {k}.
        """
    ),
    ack=("Okay, your {k} is called {v}.",),
    ask=wordings(
        """
        What is my {k}'s name? | What's my {k}'s name? | What is my {k} called?
        | What is the name of my {k}? | What's my {k} called? | Do you remember my {k}'s name?
        | How is my {k} called? | Do you know my {k}'s name? | What's the name of my {k}?
        | Tell me my {k}'s name. | Do you know the name of my {k}? | What did I call my {k}?
        | Who is my {k}? | And my {k}'s name? | What was my {k}'s name?
        | What was the name of my {k}?
        """
    ),
    answer="Your {k} is called {v}.",
    unknown="You have not told me what your {k} is called.",
    summary="your {k} is called {v}",
    who=("Who is {v}?", "That is your {k}."),
    update=(
        "Actually, my {k} is called {v}.",
        "My {k} is now called {v}.",
        "No, my {k}'s name is {v}.",
    ),
    check=("Is my {k} called {v}?", "Is my {k}'s name {v}?"),
)


RELATIVE = PET._replace(
    name="relative",
    value=values.name,
    weight=2.5,
    subjects=words.RELATIVES,
    tell=wordings(
        """
        My {k} is called {v}. | My {k}'s name is {v}. | My {k} is called {v}.
        | The name of my {k} is {v}. | I have a {k} called {v}. | I have a {k} named {v}.
        | My {k} is named {v}. | {v} is my {k}. | My {k} is {v}.
        """
    ),
)


THING = Kind(
    name="thing",
    value=values.thing,
    weight=4,
    subjects=words.THINGS + words.NOUNS,
    tell=wordings(
        """
        My {k} is {v}. | My {k} is {v}. | My {k} is called {v}. | Remember that my {k} is {v}.
        | My {k}: {v} | The name of my {k} is {v}. | Please remember: my {k} is {v}.
        | Note that my {k} is {v}.
        """
    ),
    ack=("Okay, your {k} is {v}.",),
    ask=wordings(
        """
        What is my {k}? | What's my {k}? | What is my {k} called? | Do you remember my {k}?
        | What was my {k}? | Do you know my {k}? | Tell me my {k}. | What is my {k}?
        | Which {k} do I have? | And my {k}?
        """
    ),
    answer="Your {k} is {v}.",
    unknown="You have not told me what your {k} is.",
    summary="your {k} is {v}",
    update=(
        "Actually, my {k} is {v}.",
        "My {k} is now {v}.",
        "My new {k} is {v}.",
        "No, my {k} is {v}.",
    ),
    check=("Is my {k} {v}?",),
)


NUMBER = Kind(
    name="number",
    value=words.number,
    weight=3.5,
    tell=wordings(
        """
        Remember the number {v}. | Remember the number {v}. | Please remember the number {v}.
        | Remember this number: {v}. | The number is {v}. | My number is {v}.
        | Keep the number {v} in mind. | Can you remember the number {v}? | Remember {v}.
        | Remember number {v} | My lucky number is {v}. | The secret number is {v}.
        | Store the number {v}. | Don't forget the number {v}.
        """
    ),
    ack=("Okay, I will remember the number {v}.",),
    ask=wordings(
        """
        What number did I tell you? | What is the number? | What was the number?
        | Which number did I tell you? | What number did I ask you to remember?
        | What number should you remember? | Tell me the number. | Do you remember the number?
        | What's the number? | Which number did I ask you to remember? | What is my number?
        | What's my number? | What was my number? | What is my lucky number? | The number?
        | Which number should you remember? | Do you still know the number?
        | What was the secret number? | What number did you remember?
        | What number did I give you? | What was that number again?
        | What number did I tell you to remember?
        | What number do you remember?
        """
    ),
    answer="The number is {v}.",
    unknown="You have not told me a number.",
    summary="I should remember the number {v}",
    update=wordings(
        """
        Remember the number {v} instead. | No, the number is {v}. | The number is now {v}.
        | Now remember the number {v}.
        """
    ),
    check=("Is the number {v}?", "Was the number {v}?"),
)


WORD = Kind(
    name="word",
    value=values.word,
    weight=1.5,
    tell=wordings(
        """
        Remember the word {v}. | Please remember the word {v}. | Remember this word: {v}.
        | The word is {v}. | The secret word is {v}. | Keep the word {v} in mind.
        | The password is {v}. | The code word is {v}.
        """
    ),
    ack=("Okay, I will remember the word {v}.",),
    ask=wordings(
        """
        What word did I tell you? | What is the word? | What was the word?
        | Which word should you remember? | What word did I ask you to remember?
        | Do you remember the word? | Tell me the word. | What is the secret word?
        | What's the password? | What is the code word? | Which word was it?
        """
    ),
    answer="The word is {v}.",
    unknown="You have not told me a word to remember.",
    summary="I should remember the word {v}",
    update=("Remember the word {v} instead.", "No, the word is {v}.", "The word is now {v}."),
    check=("Is the word {v}?",),
)
