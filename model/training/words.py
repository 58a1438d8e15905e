"""The word lists of the dialog generator, and which of their words are held out from training."""

import random
import zlib
from typing import Literal

from model.training.names import NAMES, PET_NAMES, SURNAMES
from model.training.wordings import word_list

Split = Literal["train", "eval"]
SALT = 58


CITIES = word_list(
    """
    Paris, Aarhus, Accra, Adelaide, Algiers, Amman, Amsterdam, Ankara, Antwerp, Athens, Atlanta,
    Auckland, Austin, Baghdad, Baku, Baltimore, Bangkok, Barcelona, Basel, Beijing, Beirut,
    Belfast, Belgrade, Bergen, Berlin, Bern, Bilbao, Birmingham, Bogota, Bologna, Bordeaux,
    Boston, Bratislava, Bremen, Brisbane, Bristol, Brussels, Bucharest, Budapest, Buenos Aires,
    Cairo, Calgary, Cambridge, Canberra, Cape Town, Caracas, Cardiff, Casablanca, Chicago,
    Cologne, Copenhagen, Cork, Cracow, Dakar, Dallas, Damascus, Delhi, Denver, Detroit, Dhaka,
    Doha, Dortmund, Dresden, Dubai, Dublin, Durban, Edinburgh, Florence, Frankfurt, Galway,
    Gdansk, Geneva, Genoa, Ghent, Glasgow, Gothenburg, Graz, Grenoble, Hamburg, Hanoi, Hanover,
    Havana, Helsinki, Hong Kong, Honolulu, Houston, Innsbruck, Istanbul, Jakarta, Jerusalem,
    Johannesburg, Kabul, Kampala, Karachi, Kathmandu, Kazan, Kiev, Kingston, Kyoto, Lagos,
    Lahore, Leeds, Leicester, Leipzig, Lille, Lima, Lisbon, Liverpool, Ljubljana, London, Los
    Angeles, Luanda, Lucerne, Lyon, Madrid, Malaga, Malmo, Manchester, Manila, Marseille,
    Melbourne, Memphis, Mexico City, Miami, Milan, Minsk, Montevideo, Montreal, Moscow, Mumbai,
    Munich, Nairobi, Naples, New York, Nice, Nottingham, Novosibirsk, Odessa, Oslo, Ottawa,
    Oxford, Palermo, Panama City, Perth, Phoenix, Porto, Portland, Prague, Quebec, Quito,
    Reykjavik, Riga, Rome, Rotterdam, Salzburg, San Diego, San Francisco, Santiago, Sarajevo,
    Seattle, Seoul, Seville, Shanghai, Sheffield, Singapore, Skopje, Sofia, Stockholm,
    Strasbourg, Stuttgart, Sydney, Taipei, Tallinn, Tampere, Tbilisi, Tehran, Tel Aviv, Tirana,
    Tokyo, Toronto, Toulouse, Trieste, Tripoli, Tunis, Turin, Utrecht, Valencia, Vancouver,
    Venice, Verona, Vienna, Vilnius, Warsaw, Washington, Wellington, Winnipeg, Yerevan, York,
    Zagreb, Zurich, Zürich, Malmö, São Paulo, Москва
    """
)

COUNTRIES = word_list(
    """
    France, Germany, Italy, Spain, Portugal, England, Scotland, Ireland, Wales, Poland, Sweden,
    Norway, Finland, Denmark, Iceland, Russia, Ukraine, Turkey, Greece, Egypt, Morocco, Kenya,
    Nigeria, Ghana, Ethiopia, South Africa, India, Pakistan, Nepal, China, Japan, Korea, Vietnam,
    Thailand, Indonesia, Australia, New Zealand, Canada, Mexico, Brazil, Chile, Peru, Argentina,
    Colombia, Cuba, Jamaica, the Netherlands, Belgium, Austria, Hungary, Romania, Serbia, Croatia,
    Iran, Iraq, Israel, Texas
    """
)

COLOURS = word_list(
    """
    blue, red, green, yellow, orange, purple, pink, black, white, grey, brown, turquoise,
    violet, indigo, magenta, cyan, teal, beige, gold, silver, crimson, scarlet, lavender, olive,
    maroon, navy, lime, coral, ivory, amber, emerald, mint, peach, salmon, chartreuse, mauve,
    ochre, ruby, khaki, dark green, light blue, sky blue, bright red, pale yellow
    """
)

FOODS = word_list(
    """
    pizza, pasta, sushi, ramen, curry, tacos, burgers, salad, soup, rice, noodles, dumplings,
    pancakes, waffles, lasagna, risotto, paella, gnocchi, ravioli, spaghetti, falafel, hummus,
    kebab, couscous, goulash, stew, chili, burritos, nachos, steak, salmon, tuna, lobster,
    shrimp, oysters, chicken, turkey, duck, bacon, sausages, meatballs, omelette, scrambled
    eggs, porridge, muesli, yoghurt, cheese, bread, croissants, bagels, pretzels, muffins,
    brownies, cookies, ice cream, chocolate, cheesecake, apple pie, strudel, tiramisu, pudding,
    honey, jam, peanut butter, apples, bananas, cherries, strawberries, raspberries,
    blueberries, mangoes, pineapple, watermelon, grapes, peaches, plums, pears, oranges, lemons,
    avocado, tomatoes, potatoes, french fries, mashed potatoes, carrots, broccoli, spinach,
    mushrooms, pumpkin soup, borscht, pierogi, kimchi, bibimbap, pho, pad thai, tempura, miso
    soup, tofu, fish and chips, shepherd pie, roast beef, garlic bread, baklava, gazpacho,
    fondue, schnitzel
    """
)

HOBBIES = word_list(
    """
    hiking, chess, reading, cooking, painting, drawing, swimming, running, cycling, climbing,
    gardening, fishing, sailing, surfing, skiing, skating, dancing, singing, knitting, sewing,
    baking, photography, pottery, origami, archery, fencing, boxing, judo, karate, yoga, tennis,
    football, basketball, volleyball, badminton, golf, rugby, cricket, hockey, bowling,
    juggling, camping, kayaking, rowing, diving, snorkeling, skateboarding, snowboarding, horse
    riding, bird watching, stargazing, astronomy, woodworking, calligraphy, embroidery, playing
    guitar, playing piano, playing the violin, playing drums, writing, blogging, gaming, board
    games, card games, poker, puzzles, crosswords, sudoku, collecting stamps, collecting coins,
    model trains, robotics, programming, travelling, meditation, pilates, jogging,
    weightlifting, parkour, paragliding, beekeeping, brewing, candle making, quilting,
    sculpting, theatre, improv, karaoke, geocaching, darts, table tennis, backgammon
    """
)

JOBS = word_list(
    """
    teacher, doctor, nurse, engineer, programmer, designer, architect, lawyer, baker, butcher,
    chef, cook, waiter, farmer, gardener, plumber, electrician, carpenter, mechanic, driver,
    pilot, sailor, soldier, police officer, firefighter, judge, accountant, banker, cashier,
    barber, hairdresser, tailor, painter, sculptor, writer, poet, journalist, editor, librarian,
    translator, musician, singer, actor, dancer, director, photographer, scientist, biologist,
    chemist, physicist, astronomer, geologist, historian, philosopher, psychologist, dentist,
    surgeon, vet, pharmacist, midwife, social worker, coach, trainer, referee, astronaut, diver,
    fisherman, miner, blacksmith, jeweller, florist, brewer, postman, courier, consultant,
    manager, secretary, receptionist, salesman, analyst, statistician, researcher, professor,
    tutor, data scientist, web developer, bus driver, taxi driver, truck driver, optician,
    beekeeper, locksmith, bricklayer, roofer, welder, potter, weaver, illustrator, animator
    """
)

PETS = word_list(
    """
    dog, cat, rabbit, hamster, parrot, horse, fish, turtle, pony, goat, snake, lizard, mouse,
    puppy, kitten
    """
)

RELATIVES = word_list(
    """
    sister, brother, mother, father, mum, dad, mom, wife, husband, son, daughter, uncle, aunt,
    cousin, grandmother, grandfather, grandma, best friend, friend, boss, neighbour, teacher,
    girlfriend, boyfriend, partner, niece, nephew, colleague, roommate
    """
)

THINGS = word_list(
    """
    car, bike, boat, laptop, phone, computer, band, team, project, company, school, street, street
    name, garden, nickname, favourite book, favourite movie, favourite song, favourite band,
    favourite animal, favourite sport, favourite drink, favourite number, favourite season,
    favourite game, favourite fruit, favourite teacher, favourite writer, birthday, shoe size, room
    number, hotel, plane, horse stable, office, surname, last name, middle name, username,
    telescope, guitar, piano, motorbike, dream, plan, goal, star sign, hometown, country, language,
    island, hero, robot, printer, server, router, desk, lamp, umbrella, backpack, cottage, planet,
    perfume, train, flight, gate, bank, dentist, doctor, hairdresser, landlord, horse, gym,
    password, email, email address, phone number, postcode, wifi password, wifi network, account,
    blood type, mother tongue, nationality, religion, major, degree, university, subject,
    instrument, club, shop, favourite subject, favourite actor, favourite singer, favourite place,
    favourite city, favourite country, favourite flower, favourite word, favourite toy, ship, tent,
    tool, website, blog, channel, motto, wish, fear, allergy, diet, breakfast, lunch, dinner, drink,
    coffee, cake, hat, coat, shirt, dress, watch, ring, camera, tablet, sofa, bed, house, flat,
    room, kitchen, roof, door, wall, curtain, carpet, tree, plant, flower, avatar, character
    """
)

WORDS = word_list(
    """
    apple, river, stone, window, garden, silver, thunder, candle, mirror, forest, castle,
    dragon, hammer, ladder, bridge, basket, feather, island, jacket, kettle, lantern, meadow,
    needle, ocean, pepper, quiver, rocket, saddle, tunnel, valley, wagon, zebra, anchor,
    blanket, compass, diamond, engine, falcon, glacier, harbour, igloo, jungle, kingdom, lemon,
    mountain, notebook, orchid, puzzle, rainbow, sandwich, tiger, umbrella, velvet, whistle,
    acorn, beetle, cactus, dolphin, elephant, fountain, guitar, horizon, insect, jewel, koala,
    library, magnet, nectar, octopus, pyramid, raven, shadow, temple, unicorn, volcano, walnut,
    yacht, banana, cotton, desert, emerald, flamingo, giraffe, helmet, iceberg, journey,
    keyboard, lizard, marble, novel, opera, pencil, quartz, ribbon, spiral, trumpet, violin,
    winter, summer, spring, autumn, Volvo, Toyota, Tesla, Fiat, Moby Dick, Dune, Hamlet, Matrix,
    Titanic, Casablanca, Abbey Road, Yesterday, Imagine, Arsenal, Ajax, Juventus, Falcons,
    Tigers, Red Bulls, Oak Street, Main Street
    """
)

NOUNS = tuple(word for word in WORDS if word.islower())
ADJECTIVES = word_list(
    """
    old, new, first, second, last, best, big, little, red, blue, lucky, secret, future, other, next,
    dream, summer, winter, office, daily, spare, own, ideal, hidden, preferred
    """
)
TWO_WORDS = tuple(
    f"{adjective} {noun}"
    for i, adjective in enumerate(ADJECTIVES)
    for noun in (NOUNS + THINGS)[i :: len(ADJECTIVES)]
    if not noun.startswith(("favourite", adjective))
)
FAVOURITES = tuple(f"favourite {noun}" for noun in (NOUNS + THINGS) if "favourite" not in noun)
OCCASIONS = word_list(
    """
    birthday, wedding, exam, appointment, anniversary, holiday, deadline, interview, party, concert,
    meeting, flight, trip, test, operation, graduation, lesson, date, vacation, match, presentation,
    dentist appointment, doctor's appointment, driving test, job interview, wedding anniversary,
    move, first day, checkup, training, rehearsal, lecture, course, conference, call, visit,
    departure, show, name day, due date, retirement, farewell, house warming, final, dinner, next
    appointment
    """
)
WHEN = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

SYLLABLES = word_list(
    """
    ba, be, bi, bo, bu, bra, bro, cha, cho, da, de, di, do, dra, el, en, fa, fi, flo, ga, ge,
    go, gra, gu, ha, he, ho, ja, jo, ka, ke, ki, ko, kra, la, le, li, lo, lu, ma, me, mi, mo,
    mu, na, ne, ni, no, nu, or, pa, pe, pi, po, pra, qua, ra, re, ri, ro, ru, sa, se, sha, shi,
    so, sta, stu, ta, te, ti, to, tra, tu, un, va, ve, vi, vo, wa, we, wi, xa, ya, yo, za, ze,
    zi, zo
    """
)
ENDINGS = word_list(
    """
    n, r, s, l, x, th, rd, nt, ck, m, t, lly, na, lia, son, ton, ville, berg, mund, ff, sk, nia,
    wyn, dor
    """
)

LETTERS = ("bcdfghjklmnpqrstvwxyz", "aaeeiioouuy")

SMILEYS = word_list("🙂, 😀, 😂, ❤️, 👍, 🎉, 🚀, 🐶, 🐱, 🌍, 🔥, ⭐, 🍕, 🤖, 👋, 🙏, 😎, 🌈, 🎵, ☕")
FOREIGN = word_list(
    """
    héllo, café, naïve, über, straße, garçon, mañana, señor, crème brûlée, smörgåsbord, piñata,
    jalapeño, Ångström, œuvre, żółw, příliš, čeština, größe, fjörður, привет, мир, как дела,
    спасибо, добрый день, кошка, собака, солнце, книга, Москва, доброе утро, Київ, дякую, γειά,
    καλημέρα, κόσμος, 你好, 世界, 谢谢, 早上好, 朋友, 我爱你, 东京, 日本語, こんにちは, ありがとう,
    さくら, カタカナ,
    안녕하세요, 감사합니다,
    서울, 한국어, שלום, مرحبا, नमस्ते, สวัสดี
    """
)

SCRIPTS = (
    "абвгдежзиклмнопрстуфхцчшщыьэюя",
    "àáâãäåæçèéêëìíîïñòóôõöøùúûüý",
    "αβγδεζηθικλμνξοπρστυφχψω",
    "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后",
    "あいうえおかきくけこさしすせそたちつてとなにぬねの",
    "가나다라마바사아자차카타파하고노도로모보소",
)


def is_held_out(word: str) -> bool:
    """Return whether the word, however typed, is one of the eighth kept for evaluation. The salt
    leaves the most common words (Ada, Paris, Rex, blue) to training.
    """
    return zlib.crc32(f"{SALT}:{word.lower()}".encode()) % 8 == 0


def draw(rng: random.Random, words: tuple[str, ...], split: Split) -> str:
    """Return a word of this split."""
    while is_held_out(word := rng.choice(words)) != (split == "eval"):
        pass
    return word


def made_up(rng: random.Random, split: Split) -> str:
    """Return a new lower-case word, which can only be copied, not known by heart."""
    while True:
        word = _of_syllables(rng) if rng.random() < 0.6 else _of_letters(rng)
        if is_held_out(word) == (split == "eval"):
            return word


def _of_syllables(rng: random.Random) -> str:
    return "".join(rng.choices(SYLLABLES, k=rng.choice((1, 2, 2, 3)))) + rng.choice(ENDINGS)


def _of_letters(rng: random.Random) -> str:
    """Return random letters, mostly alternating consonants and vowels."""
    at, word = rng.randrange(2), ""
    for _ in range(rng.randint(3, 9)):
        word += rng.choice(LETTERS[at])
        at = rng.randrange(2) if rng.random() < 0.25 else 1 - at
    return word


def number(rng: random.Random, split: Split) -> str:
    """Return a number of one to nine digits, often small; those below 100 are in both splits."""
    while True:
        value = str(rng.randrange(10 ** rng.choice((2, 2, 2, 3, 4, 4, 5, 6, 7, 9))))
        if len(value) < 3 or is_held_out(value) == (split == "eval"):
            return value


def letters(rng: random.Random) -> str:
    """Return one or two short words of one script other than plain Latin."""
    script = rng.choice(SCRIPTS)
    parts = (
        "".join(rng.choices(script, k=rng.randint(2, 7))) for _ in range(rng.choice((1, 1, 2)))
    )
    return " ".join(parts)


def is_common(value: str) -> bool:
    """Return whether the word is in the lists."""
    return all(word in COMMON for word in value.lower().replace("a ", "", 1).split())


COMMON = frozenset(
    part.lower()
    for word_list in (
        NAMES,
        SURNAMES,
        PET_NAMES,
        CITIES,
        COUNTRIES,
        COLOURS,
        FOODS,
        HOBBIES,
        JOBS,
        WORDS,
    )
    for word in word_list
    for part in word.split()
)
