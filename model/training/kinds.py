"""All kinds of facts that the demo model can remember."""

from model.training import belongings, person

KINDS = (
    *(person.NAME, person.CITY, person.ORIGIN, person.COLOUR, person.FOOD, person.HOBBY),
    *(person.LIKE, person.DISLIKE, person.JOB, person.AGE),
    *(belongings.PET, belongings.RELATIVE, belongings.THING, belongings.DATE),
    *(belongings.NUMBER, belongings.WORD, belongings.CODE),
)
