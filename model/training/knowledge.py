"""The little that the demo model knows of the world."""

from model.training.faq import canned
from model.training.wordings import wordings

FACTS = (
    canned(
        """
        What is the capital of France? | What's the capital of France? | Capital of France?
        """,
        "The capital of France is Paris.",
    ),
    canned(
        """
        What is the capital of Germany? | What's the capital of Germany? | Capital of Germany?
        """,
        "The capital of Germany is Berlin.",
    ),
    canned(
        """
        What is the capital of England? | What's the capital of the UK? | Capital of England?
        """,
        "The capital of England is London.",
    ),
    canned(
        """
        What is the capital of Italy? | What's the capital of Italy? | Capital of Italy?
        """,
        "The capital of Italy is Rome.",
    ),
    canned(
        """
        What is the capital of Spain? | What's the capital of Spain? | Capital of Spain?
        """,
        "The capital of Spain is Madrid.",
    ),
    canned(
        """
        What is the capital of Japan? | What's the capital of Japan? | Capital of Japan?
        """,
        "The capital of Japan is Tokyo.",
    ),
    canned(
        """
        What is the capital of Austria? | What's the capital of Austria?
        """,
        "The capital of Austria is Vienna.",
    ),
    canned(
        """
        What is the capital of Russia? | What's the capital of Russia?
        """,
        "The capital of Russia is Moscow.",
    ),
    canned(
        """
        What colour is the sky? | What color is the sky? | Which colour has the sky?
        """,
        "The sky is blue.",
    ),
    canned(
        """
        What colour is grass? | What color is grass? | What colour is the grass?
        """,
        "Grass is green.",
    ),
    canned(
        """
        What colour is snow? | What color is snow?
        """,
        "Snow is white.",
    ),
    canned(
        """
        What colour is the sun? | What color is the sun?
        """,
        "The sun is yellow.",
    ),
    canned(
        """
        What does a cow say? | What sound does a cow make?
        """,
        "A cow says moo.",
    ),
    canned(
        """
        What does a cat say? | What sound does a cat make?
        """,
        "A cat says meow.",
    ),
    canned(
        """
        What does a dog say? | What sound does a dog make?
        """,
        "A dog says woof.",
    ),
    canned(
        """
        How many legs does a dog have? | How many legs does a cat have?
        """,
        "It has four legs.",
    ),
    canned(
        """
        How many legs does a spider have? | How many legs has a spider?
        """,
        "A spider has eight legs.",
    ),
    canned(
        """
        How many days are in a week? | How many days does a week have? | How many days has a week?
        """,
        "A week has 7 days.",
    ),
    canned(
        """
        How many months are in a year? | How many months does a year have?
        """,
        "A year has 12 months.",
    ),
    canned(
        """
        How many hours are in a day? | How many hours does a day have?
        """,
        "A day has 24 hours.",
    ),
    canned(
        """
        How many minutes are in an hour? | How many minutes does an hour have?
        """,
        "An hour has 60 minutes.",
    ),
    canned(
        """
        How many seconds are in a minute? | How many seconds does a minute have?
        """,
        "A minute has 60 seconds.",
    ),
    canned(
        """
        Is water wet? | Is ice cold? | Is fire hot? | Is the sun hot? | Is the earth round?
        """,
        "Yes, it is.",
    ),
    canned(
        """
        What is the biggest planet? | Which planet is the biggest?
        """,
        "Jupiter is the biggest planet.",
    ),
    canned(
        """
        What is the meaning of life? | What's the meaning of life?
        | What is the answer to everything?
        """,
        "The answer is 42.",
    ),
)


LISTS = (
    canned(
        """
        List the days of the week. | What are the days of the week? | Name the days of the week.
        | Tell me the days of the week. | Say the days of the week. | Days of the week
        | List all days of the week. | Name all days of the week.
        | Can you list the days of the week? | Which days does a week have? | List the days
        | The days of the week, please.
        """,
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday.",
    ),
    canned(
        """
        List the months. | What are the months of the year? | Name the months.
        | Tell me the months. | List the months of the year. | Say the months.
        | Months of the year | List all months. | Name all the months. | Can you list the months?
        | Which months are there? | List all twelve months. | The months of the year, please.
        | Name the months of the year.
        """,
        "January, February, March, April, May, June, July, August, September, October, November, "
        "December.",
    ),
    canned(
        """
        Say the alphabet. | What is the alphabet? | Tell me the alphabet. | List the letters.
        | List the alphabet. | Recite the alphabet. | Can you say the alphabet? | Say the ABC.
        | The alphabet, please. | What are the letters of the alphabet? | ABC
        """,
        "A, B, C, D, E, F, G, H, I, J, K, L, M, N, O, P, Q, R, S, T, U, V, W, X, Y, Z.",
    ),
    canned(
        """
        List the seasons. | What are the four seasons? | Name the seasons.
        | What seasons are there?
        """,
        "Spring, summer, autumn, winter.",
    ),
    canned(
        """
        List the colours of the rainbow. | What are the colors of the rainbow?
        | Name the colours of the rainbow.
        """,
        "Red, orange, yellow, green, blue, indigo, violet.",
    ),
    canned(
        """
        List the planets. | What are the planets? | Name the planets. | Which planets are there?
        """,
        "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune.",
    ),
)


DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)


ORDINALS = (
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
)


OPPOSITES = wordings(
    """
    hot cold | big small | up down | left right | good bad | fast slow | old new | happy sad
    | light dark | high low | rich poor | early late | full empty | hard soft | strong weak
    | open closed | day night | black white | yes no | wet dry | long short | near far
    | clean dirty | thick thin | loud quiet | young old | easy difficult | true false
    | right wrong | first last | in out | on off | love hate | win lose | begin end | start stop
    | cheap expensive | sweet sour | heavy light | wide narrow | inside outside | north south
    | east west | day night
    """
)
