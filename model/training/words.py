"""The word lists of the dialog generator, and which of their words training never sees.

Knows words only: no sentences, no skills.
"""

import random
import zlib
from typing import Literal

Split = Literal["train", "eval"]
SALT = 58


def _listed(text: str) -> tuple[str, ...]:
    words = (" ".join(word.split()) for word in text.split(","))
    return tuple(dict.fromkeys(word for word in words if word))


NAMES = _listed(
    """
    Ada, Aaron, Abigail, Adam, Adele, Adrian, Agnes, Ahmed, Aisha, Alan, Albert, Alejandro,
    Alex, Alice, Alina, Amara, Amelia, Amir, Amy, Ana, Anders, Andrea, Andrew, Angela, Anika,
    Anna, Anton, Antonia, Aria, Arjun, Arthur, Astrid, Aurora, Ava, Axel, Barbara, Barnaby,
    Beatrice, Ben, Benjamin, Bernard, Beth, Bianca, Bob, Boris, Brenda, Brian, Bridget, Bruce,
    Caleb, Camille, Carl, Carla, Carlos, Carmen, Caroline, Casper, Cecilia, Charles, Charlotte,
    Chen, Chiara, Chloe, Chris, Clara, Claudia, Colin, Connor, Cora, Cyril, Dagmar, Daniel,
    Daphne, Daria, David, Deborah, Declan, Delia, Dennis, Diana, Diego, Dmitri, Dominic, Dora,
    Duncan, Dylan, Edgar, Edith, Eduardo, Edward, Eleanor, Elena, Elias, Elijah, Elise, Ella,
    Elliot, Elsa, Emil, Emilia, Emily, Emma, Enzo, Eric, Erin, Ernest, Esther, Ethan, Eugene,
    Eva, Evelyn, Fabian, Farid, Fatima, Felicity, Felix, Fernando, Fiona, Florence, Frances,
    Frank, Freya, Gabriel, Gareth, George, Gerald, Gina, Giovanni, Gloria, Gordon, Grace,
    Graham, Greg, Greta, Gustav, Hannah, Hans, Harold, Harriet, Harry, Hassan, Hazel, Heidi,
    Helen, Henrik, Henry, Hiroshi, Holly, Hugo, Ian, Ibrahim, Ida, Igor, Ilse, Imogen, Ines,
    Ingrid, Irene, Iris, Isaac, Isabel, Isla, Ivan, Ivy, Jack, Jacob, Jade, James, Jan, Jane,
    Janet, Jasmine, Jason, Javier, Jennifer, Jeremy, Jesse, Jim, Joan, Joe, Johan, John, Jonas,
    Jonathan, Jorge, Joseph, Judith, Julia, Julian, Juliet, Jun, Kai, Karen, Karim, Karl, Kate,
    Katya, Keiko, Keith, Kenji, Kevin, Kim, Kira, Klaus, Konstantin, Kurt, Kyle, Lara, Lars,
    Laura, Lauren, Lea, Leah, Leila, Lena, Leo, Leonard, Leonora, Lewis, Liam, Lily, Linda,
    Linus, Lionel, Lisa, Liu, Liz, Logan, Lola, Lorenzo, Louis, Louise, Lucas, Lucia, Lucy,
    Luis, Luke, Luna, Lydia, Mabel, Madeleine, Magda, Magnus, Malik, Marco, Margaret, Maria,
    Marie, Marina, Mario, Mark, Marta, Martin, Mary, Mateo, Matilda, Matthew, Maud, Max, Maya,
    Megan, Mei, Melissa, Mia, Michael, Miguel, Mila, Miles, Milo, Mina, Miriam, Mohammed, Mona,
    Monica, Morgan, Muriel, Nadia, Nancy, Naomi, Natalie, Natasha, Nathan, Ned, Neil, Nia,
    Nicholas, Nicole, Nigel, Nikolai, Nina, Noah, Noel, Nora, Norman, Octavia, Olaf, Olga,
    Oliver, Olivia, Omar, Oscar, Otto, Ottilie, Owen, Pablo, Patricia, Patrick, Paul, Paula,
    Pavel, Pedro, Penelope, Percy, Peter, Petra, Phil, Philippa, Phoebe, Pierre, Priya, Quentin,
    Quinn, Rachel, Rafael, Ralph, Ramona, Raymond, Rebecca, Reggie, Renata, Rhys, Ricardo,
    Richard, Rita, Robert, Robin, Roger, Roland, Rosa, Rose, Rosemary, Roxanne, Ruby, Rupert,
    Ruth, Ryan, Sabine, Sadie, Sally, Sam, Samantha, Samuel, Sandra, Sanjay, Sara, Sarah, Sasha,
    Saul, Scott, Sean, Sebastian, Selma, Serena, Sergei, Seth, Shirley, Sigrid, Silvia, Simon,
    Sofia, Solveig, Sonia, Sophie, Stanley, Stefan, Stella, Stephen, Steve, Stuart, Susan, Sven,
    Sylvia, Tamara, Tanya, Tara, Tariq, Ted, Teresa, Theodore, Theresa, Thomas, Tim, Tobias,
    Todd, Tom, Tony, Tracy, Tristan, Ulrich, Una, Ursula, Valentina, Vanessa, Vera, Victor,
    Victoria, Vikram, Vincent, Viola, Violet, Vivian, Vladimir, Walter, Wanda, Wei, Wendy,
    Wilhelm, William, Winifred, Xavier, Yasmin, Yolanda, Yuki, Yusuf, Yvonne, Zachary, Zara,
    Zelda, Zoe, José, Zoë, René, Jürgen, Søren, Łukasz, Иван, Юлия, Мария, Олег
    """
)

SURNAMES = _listed(
    """
    Adler, Baker, Becker, Bell, Brown, Carter, Clark, Cooper, Costa, Davies, Evans, Fischer,
    Foster, Garcia, Gray, Hansen, Hill, Hughes, Ivanov, Jensen, Johnson, Jones, Keller, Khan,
    King, Lee, Lindgren, Lopez, Lovelace, Martin, Meyer, Miller, Moore, Moreau, Murphy,
    Nakamura, Nguyen, Novak, Okafor, Parker, Patel, Pereira, Quinn, Rossi, Santos, Schmidt,
    Silva, Smith, Stone, Tanaka, Taylor, Turner, Walker, Watson, White, Wilson, Wright, Young
    """
)

PET_NAMES = _listed(
    """
    Rex, Apollo, Archie, Bagel, Bailey, Bandit, Barney, Basil, Bear, Bella, Benji, Biscuit,
    Blackie, Boots, Bruno, Bubbles, Buddy, Buster, Button, Caramel, Casper, Charlie, Chester,
    Chewie, Chip, Cinnamon, Cleo, Clover, Coco, Cookie, Copper, Cosmo, Daisy, Dexter, Diesel,
    Domino, Dusty, Echo, Fang, Felix, Fido, Finn, Flash, Fluffy, Frodo, Garfield, Gizmo, Goldie,
    Gulliver, Gus, Hamlet, Hazel, Honey, Hunter, Jasper, Jelly, Kiki, Kitty, Kiwi, Lady, Lucky,
    Lulu, Maggie, Mango, Marble, Maximus, Merlin, Mickey, Midnight, Milo, Minnie, Misty, Mocha,
    Molly, Moose, Muffin, Murphy, Nala, Nemo, Nugget, Nutmeg, Oreo, Pancake, Patch, Peaches,
    Peanut, Pebbles, Penny, Pepper, Pickle, Pippin, Pixel, Pluto, Poppy, Pudding, Pumpkin,
    Radar, Ranger, Rascal, Rocky, Rosie, Rufus, Rusty, Salem, Scooter, Scout, Shadow, Simba,
    Smokey, Sneakers, Snickers, Snoopy, Socks, Sparky, Spot, Sprout, Stitch, Sunny, Taco,
    Tarzan, Teddy, Thor, Tigger, Tinker, Toby, Toffee, Trixie, Truffle, Tucker, Tux, Twix,
    Velvet, Waffles, Whiskers, Willow, Winston, Wookie, Yoda, Ziggy, Zorro, Mrs Tibbles, Mister
    Fox, Captain Fluff, Sir Barks, Lady Paws
    """
)

CITIES = _listed(
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

COLOURS = _listed(
    """
    blue, red, green, yellow, orange, purple, pink, black, white, grey, brown, turquoise,
    violet, indigo, magenta, cyan, teal, beige, gold, silver, crimson, scarlet, lavender, olive,
    maroon, navy, lime, coral, ivory, amber, emerald, mint, peach, salmon, chartreuse, mauve,
    ochre, ruby, khaki, dark green, light blue, sky blue, bright red, pale yellow
    """
)

FOODS = _listed(
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

HOBBIES = _listed(
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

JOBS = _listed(
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

PETS = _listed(
    """
    dog, cat, rabbit, hamster, parrot, horse, fish, turtle, pony, goat, snake, lizard, mouse,
    puppy, kitten
    """
)

RELATIVES = _listed(
    """
    sister, brother, mother, father, mum, dad, mom, wife, husband, son, daughter, uncle, aunt,
    cousin, grandmother, grandfather, grandma, best friend, friend, boss, neighbour, teacher,
    girlfriend, boyfriend, partner, niece, nephew, colleague, roommate
    """
)

THINGS = _listed(
    """
    car, bike, boat, laptop, phone, computer, band, team, project, company, school, street,
    street name, garden, nickname, favourite book, favourite movie, favourite song, favourite
    band, favourite animal, favourite sport, favourite drink, favourite number, favourite
    season, favourite game, favourite fruit, favourite teacher, favourite writer, birthday, shoe
    size, room number, hotel, plane, horse stable, office, surname, last name, middle name,
    username, telescope, guitar, piano, motorbike, dream, plan, goal, star sign, hometown,
    country, language, island, hero, robot, printer, server, router, desk, lamp, umbrella,
    backpack, cottage, planet, perfume, train, flight, gate
    """
)

WORDS = _listed(
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

SYLLABLES = _listed(
    """
    ba, be, bi, bo, bu, bra, bro, cha, cho, da, de, di, do, dra, el, en, fa, fi, flo, ga, ge,
    go, gra, gu, ha, he, ho, ja, jo, ka, ke, ki, ko, kra, la, le, li, lo, lu, ma, me, mi, mo,
    mu, na, ne, ni, no, nu, or, pa, pe, pi, po, pra, qua, ra, re, ri, ro, ru, sa, se, sha, shi,
    so, sta, stu, ta, te, ti, to, tra, tu, un, va, ve, vi, vo, wa, we, wi, xa, ya, yo, za, ze,
    zi, zo
    """
)
ENDINGS = _listed(
    """
    n, r, s, l, x, th, rd, nt, ck, m, t, lly, na, lia, son, ton, ville, berg, mund, ff, sk, nia,
    wyn, dor
    """
)

SMILEYS = _listed("🙂, 😀, 😂, ❤️, 👍, 🎉, 🚀, 🐶, 🐱, 🌍, 🔥, ⭐, 🍕, 🤖, 👋, 🙏, 😎, 🌈, 🎵, ☕")
FOREIGN = _listed(
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
    """One word in eight is kept for the evaluation, whatever list it stands in and however typed.

    The salt is one that leaves the commonest words (Ada, Paris, Rex, blue) to the training.
    """
    return zlib.crc32(f"{SALT}:{word.lower()}".encode()) % 8 == 0


def draw(rng: random.Random, words: tuple[str, ...], split: Split) -> str:
    """A word that belongs to this split."""
    while is_held_out(word := rng.choice(words)) != (split == "eval"):
        pass
    return word


def made_up(rng: random.Random, split: Split) -> str:
    """A lower-case word that nobody has ever used: what is copied can't be known by heart."""
    while True:
        word = "".join(rng.choices(SYLLABLES, k=rng.choice((1, 2, 2, 3)))) + rng.choice(ENDINGS)
        if is_held_out(word) == (split == "eval"):
            return word


def number(rng: random.Random, split: Split) -> str:
    """A number of one to six digits, small ones more often; those below 100 are in both splits."""
    while True:
        value = str(rng.randrange(10 ** rng.choice((2, 2, 2, 3, 4, 4, 5, 6))))
        if len(value) < 3 or is_held_out(value) == (split == "eval"):
            return value


def letters(rng: random.Random) -> str:
    """A few letters of one script that is not plain Latin."""
    return "".join(rng.choices(rng.choice(SCRIPTS), k=rng.randint(2, 6)))
