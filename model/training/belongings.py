"""Facts about a user's pets, relatives and things, and things to remember."""

from model.training import values, words
from model.training.memory import Kind
from model.training.wordings import wordings

PET = Kind(
    name="pet",
    value=values.pet,
    weight=4,
    subjects=words.PETS,
    facts=wordings(
        """
        my {k} is called {v} | my {k} is called {v} | my {k}'s name is {v} | my {k} is named {v}
        | I have a {k} called {v} | I have a {k} named {v} | the name of my {k} is {v}
        | I have a {k} and [its/his/her] name is {v} | I have a {k}, [he/she/it] is called {v}
        | [we/I] [own/got/bought/adopted/have got/have] a {k} [called/named] {v}
        | I [call/named] my {k} {v} | our {k} is [called/named] {v} | {v} is my {k}
        | {v} is the name of my {k} | {v} is [our/my] {k}'s name | my {k} has the name {v}
        | there is a {k} in my [house/life/family] called {v}
        """
    ),
    tell=wordings(
        """
        I have a {k}. [His/Her/Its] name is {v}. | I have a {k}. [He/She/It] is called {v}.
        | I got a {k}, {v}. | My {k}: {v} | Meet my {k} {v}. | This is my {k} {v}.
        | [Say hello to/Let me introduce/Here is/I present/I would like to introduce] my {k} {v}.
        """
    ),
    told="your {k} is called {v}",
    nouns=wordings(
        """
        my {k}'s name | my {k}'s name | my {k}'s name | the name of my {k} | our {k}'s name | {k}'s
        name | the {k}'s name | the name of [the/our] {k}
        """
    ),
    clauses=wordings(
        """
        what my {k} is called | what my {k}'s name is | how my {k} is called | what I call my {k}
        | what the name of my {k} is | what I named my {k} | who my {k} is
        """
    ),
    ask=wordings(
        """
        What [is/'s] my {k} called? | What is my {k} called? | How is my {k} called?
        | What did I [call/name] my {k}? | Who is my {k}? | What do I call my {k}?
        | What is our {k} called? | What name [does my {k} have/did I give my {k}]?
        | What is the {k} called? | What was my {k} called? | My {k} is called what?
        """
    ),
    unknown="You have not told me what your {k} is called.",
    who=True,
    check=wordings(
        """
        Is my {k} called {v}? | Is my {k}'s name {v}? | Is {v} my {k}? | My {k} is {v}, right?
        | Is {v} the name of my {k}?
        """
    ),
)


RELATIVE = PET._replace(
    name="relative",
    value=values.name,
    weight=3,
    subjects=words.RELATIVES,
    facts=wordings(
        """
        my {k} is called {v} | my {k} is called {v} | my {k}'s name is {v} | my {k} is named {v}
        | the name of my {k} is {v} | I have a {k} [called/named] {v} | {v} is my {k}
        | my {k} is {v} | I am [married to/living with] my {k} {v} | {v} is the name of my {k}
        | I have a {k} and [his/her] name is {v} | my {k} has the name {v} | {v} is my {k}'s name
        """
    ),
    tell=wordings(
        """
        My {k}: {v} | Meet my {k} {v}. | This is my {k} {v}. | I have a {k}, {v}. | My {k}, that is
        {v}. | [Say hello to/Let me introduce/Here is/I present/I would like to introduce] my {k}
        {v}.
        """
    ),
)


THE_THING = wordings(
    """
    [What is/What's/What was/Tell me/Give me] the {k}? | The {k}? | {k}? | Do you [know/remember]
    the {k}? | [What/Which] {k} is it? | What is the {k} again? | I need the {k}. | [Can/Could] you
    tell me the {k}?
    """
)
THING = Kind(
    name="thing",
    value=values.thing,
    weight=5,
    subjects=words.THINGS * 2 + words.NOUNS + words.TWO_WORDS + words.FAVOURITES,
    facts=wordings(
        """
        my {k} is {v} | my {k} is {v} | my {k} is {v} | my {k} is called {v} | {v} is my {k}
        | the name of my {k} is {v} | my {k} [has to be/will be/would be] {v} | our {k} is {v}
        | I [have chosen/chose/picked/took] {v} as my {k} | my {k} has the name {v}
        | my {k} is named {v} | as my {k} I [have/chose/use] {v} | the {k} is {v} | {v} is the {k}
        """
    ),
    tell=wordings("My {k}: {v} | My {k}? [It is/It's/] {v}. | {k}: {v}"),
    told="your {k} is {v}",
    nouns=wordings("my {k} | my {k} | my {k} | the name of my {k} | my {k}'s name | our {k}"),
    clauses=wordings("what my {k} is | what my {k} is called | which {k} I have | my {k}"),
    ask=wordings(
        """
        What is my {k} called? | Which {k} do I have? | What {k} do I have? | What was my {k}? |
        [What/Which] {k} do I [prefer/like/use/own/drive/want]? | Which one is my {k}? | What {k} is
        mine? | What kind of {k} do I have? | Which is my {k}? | What did I [say/tell you] about my
        {k}?
        """
    ),
    unknown="You have not told me what your {k} is.",
    check=wordings("Is my {k} {v}? | Is {v} my {k}? | My {k} is {v}, right?"),
)


DATE = Kind(
    name="date",
    value=values.date,
    weight=2.5,
    subjects=words.OCCASIONS,
    facts=wordings(
        """
        my {k} is on {v} | my {k} is on {v} | my {k} [will be/takes place/was/falls] on {v}
        | I have [my/a] {k} on {v} | the date of my {k} is {v} | on {v} I have [my/a] {k}
        | my {k} is {v} | [we have/there is] [a/our] {k} on {v} | {v} is my {k}
        """
    ),
    tell=wordings("My {k}: {v} | My {k}? On {v}. | {k}: {v} | Save the date: my {k}, {v}."),
    told="your {k} is on {v}",
    nouns=wordings("the date of my {k} | my {k} date | the day of my {k} | my {k}"),
    clauses=wordings("when my {k} is | [which/what] day my {k} is | on which day my {k} is"),
    ask=wordings(
        """
        When is my {k}? | When is my {k}? | When's my {k}? | [What/Which] day is my {k}?
        | On [what/which] [day/date] is my {k}? | When do I have my {k}? | When will my {k} be?
        | When was my {k}? | When is the {k}? | When did I say my {k} is?
        """
    ),
    unknown="You have not told me when your {k} is.",
    change=("My {k} [was moved/has moved/is moved] to {v}.", "They moved my {k} to {v}."),
    check=("Is my {k} on {v}?", "My {k} is on {v}, right?"),
)


def _to_remember(thing: str, weight: float) -> Kind:
    """Return a kind of fact to remember for its own sake, such as a number or a word."""
    return Kind(
        name=thing,
        value=words.number if thing == "number" else values.word,
        weight=weight,
        facts=wordings(
            f"""
            the {thing} is {{v}} | the {thing} is {{v}} | my {thing} is {{v}}
            | the [secret/magic/special/important] {thing} is {{v}} | {{v}} is the {thing}
            | {{v}} is my {thing} | the {thing} [to remember/for today/I want you to know] is {{v}}
            | the {thing} [in question/of the day/I have in mind/I think of/I chose] is {{v}}
            """
        ),
        tell=wordings(
            f"""
            [Remember/Please remember/Memorize/Note/Store/Save/Keep/Note down] [the/this/a] {thing}
            {{v}}. | Remember the {thing} {{v}}. | Remember this {thing}: {{v}}[./] | [Keep/Have]
            the {thing} {{v}} in mind[, please/]. | [Can/Could/Would/Will] you [please/]
            [remember/note/store/memorize/save] the {thing} {{v}}? | [I want you to/I would like you
            to/You have to/You must/Try to/Please] [remember/memorize/note] the {thing} {{v}}[,
            please/]. | [Don't/Do not/Never] forget the {thing} {{v}}. | Remember {thing} {{v}}[./,
            please./] | Here [is/comes] a {thing} [for you/to remember/to note][:/,] {{v}}. |
            {thing}: {{v}} | I [will tell you/have/give you/tell you] a {thing}[/ to remember][:/,]
            {{v}}.
            """
        ),
        told=f"I should remember the {thing} {{v}}",
        nouns=wordings(
            f"""
            the {thing} | the {thing} | my {thing} | the {thing} I [told/gave] you | that {thing}
            | the {thing} [to remember/from before/I asked you to remember] | the secret {thing}
            """
        ),
        clauses=wordings(
            f"""
            [which/what] {thing} I [told/gave] you | the {thing} | what the {thing} [was/is]
            | [which/what] {thing} [you should remember/I wanted you to remember/I had in mind]
            """
        ),
        ask=wordings(
            f"""
            [What/Which] {thing} did I [tell/give/ask you to remember/want you to remember/mention
            to] [you/]? | [What/Which] {thing} did I tell you[ to remember/]? | The {thing}? |
            [What/Which] {thing} [should you remember/do you remember/did you remember/was it]? |
            [What/Which] {thing} [did you store/did you note/do you have to remember/do you know/did
            I give you]? | [What/Which] {thing} [was I talking about/did I mention/have you
            saved/did I let you store]? | [What/Which] was [the/that/my] {thing}[ again/]? | What
            {thing} did I have in mind?
            """
        ),
        unknown=f"You have not told me a {thing}{'' if thing == 'number' else ' to remember'}.",
        change=(f"Remember the {thing} {{v}} instead.", f"Now remember the {thing} {{v}}."),
        check=(f"[Is/Was] the {thing} {{v}}?", f"The {thing} [is/was] {{v}}, right?"),
        ack=f"Okay, I will remember the {thing} {{v}}.",
        answer=f"The {thing} is {{v}}.",
    )


NUMBER = _to_remember("number", 3.5)
NUMBER = NUMBER._replace(tell=(*NUMBER.tell, "Remember {v}[./]", "[Save/Store/Keep/Note] {v}."))
WORD = _to_remember("word", 1.5)
CODE = _to_remember("code", 0.7)._replace(value=values.code)
