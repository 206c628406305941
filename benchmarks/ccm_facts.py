"""Conversations in which a user tells facts, and questions about them: what the packaged adapter is trained and tested on.

Every fact is a relation (a cat's name, a job, a door code) with a value that nobody can guess. Values are in one split only:
a test value was never seen in training, so what a memory answers was read, not learned. A fifth of the names are words of the
vocabulary or made up, so that any word can be a name.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from gate_texts import made_up_word

SPLITS = ("train", "test")
VALUES = {
    "name": "Adam Ada Agnes Alba Amir Anders Anika Anton Arne Astrid Aya Basil Bea Bruno Carla Cedric Chen Clara Cleo "
    "Cyril Dana Dario David Dina Edgar Elena Elias Elsa Emil Enzo Erik Esther Ewa Fatima Felix Fiona Flora Frida "
    "Gabriel Gina Gustav Hana Hannah Hassan Hector Heidi Helen Hugo Ida Igor Ines Ingrid Irene Isaac Ivan Jack "
    "Jana Jasper Joel Jonas Julia Kai Karim Katrin Kenji Klara Lars Laura Leila Leo Lina Linus Lorenzo Lucia Luis "
    "Magda Malik Marco Maria Marta Mateo Maya Mila Mina Miriam Nadia Naomi Nils Nina Noah Nora Olga Olivia Oscar "
    "Otto Pablo Paula Pedro Petra Philip Pia Rafael Rania Rita Robin Rosa Ruben Sami Sara Selma Simon Sofia "
    "Stella Sven Tamara Tariq Theo Thomas Tobias Ulla Uma Valerie Vera Viktor Walter Wanda Yara Yusuf Zara Zoe",
    "pet_name": "Amber Apollo Bandit Basil Biscuit Blaze Bonnie Buster Caesar Casper Cookie Copper Daisy Dexter Domino Echo "
    "Ember Falcon Figaro Ginger Gizmo Hazel Hunter Jasper Juno Kiwi Luna Maple Merlin Milo Mocha Nala Nemo Olive "
    "Oreo Pepper Pickle Poppy Pumpkin Rocky Rusty Sable Salem Shadow Simba Socks Sparky Storm Sunny Tiger Toffee "
    "Trixie Truffle Velvet Waffles Whiskers Willow Winston Ziggy Zorro",
    "city": "Accra Athens Auckland Baku Bangkok Barcelona Bergen Berlin Bogota Boston Brussels Budapest Cairo Cape_Town "
    "Chicago Copenhagen Cordoba Dakar Dallas Delhi Denver Dublin Edinburgh Florence Geneva Genoa Glasgow Hamburg "
    "Hanoi Havana Helsinki Istanbul Jakarta Kiev Kyoto Lagos Leeds Lima Lisbon Liverpool London Lyon Madrid Malmo "
    "Manila Marseille Melbourne Miami Milan Minsk Montreal Moscow Munich Nairobi Naples Oslo Osaka Ottawa Oxford "
    "Paris Perth Porto Prague Quito Riga Rome Salzburg Santiago Seattle Seoul Seville Sofia Stockholm Sydney "
    "Tallinn Tehran Tokyo Toronto Tunis Turin Utrecht Valencia Venice Vilnius Warsaw York Zagreb Zurich",
    "colour": "amber beige black blue brown crimson cream golden green grey indigo ivory lavender navy olive orange pink "
    "purple red scarlet silver turquoise violet white yellow",
    "animal": "canary cat chicken cow dog donkey duck ferret goat goldfish goose hamster hedgehog horse lizard llama mouse "
    "owl parrot pig pigeon pony rabbit rat sheep snake spider squirrel tortoise turtle",
    "job": "accountant actor architect baker barber biologist bookseller bricklayer butcher carpenter chemist cook "
    "dancer dentist designer doctor driver electrician engineer farmer firefighter fisherman florist gardener "
    "geologist glassblower hairdresser historian interpreter jeweller journalist judge lawyer librarian locksmith "
    "mathematician mechanic midwife miner musician nurse optician painter pharmacist photographer physicist pilot "
    "plumber poet policeman potter printer sailor sculptor shepherd shoemaker singer surgeon surveyor tailor "
    "teacher translator vet waiter watchmaker weaver welder",
    "food": "apples bananas beans bread carrots cheese cherries chocolate couscous cucumber curry dumplings eggs fish "
    "garlic ginger grapes honey lasagna lemons lentils mango melon mushrooms noodles nuts olives onions oranges "
    "pancakes pasta peaches pears peas pineapple pizza plums potatoes prawns pumpkin raspberries rice risotto "
    "salad salmon sausages soup spinach strawberries sushi tofu tomatoes tuna waffles walnuts yoghurt",
    "instrument": "accordion bagpipes banjo bassoon cello clarinet drums flute guitar harmonica harp horn lute mandolin oboe "
    "organ piano recorder saxophone tambourine trombone trumpet tuba ukulele viola violin xylophone zither",
    "hobby": "archery backgammon badminton baseball basketball bowling boxing bridge climbing cricket curling cycling "
    "dancing darts fencing fishing football golf gymnastics handball hiking hockey judo karate kayaking knitting "
    "pottery rowing rugby running sailing skating skiing snooker squash surfing swimming tennis volleyball "
    "wrestling yoga",
    "language": "Arabic Basque Bengali Bulgarian Catalan Chinese Croatian Czech Danish Dutch Estonian Finnish French Georgian "
    "German Greek Hebrew Hindi Hungarian Icelandic Irish Italian Japanese Korean Latin Latvian Norwegian Persian "
    "Polish Portuguese Romanian Russian Serbian Spanish Swahili Swedish Tamil Thai Turkish Ukrainian Urdu "
    "Vietnamese Welsh",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "month": "January February March April May June July August September October November December",
    "time": "six seven eight nine ten eleven noon midnight half_past_six half_past_seven half_past_eight half_past_nine "
    "quarter_past_six quarter_past_eight quarter_past_ten quarter_to_seven quarter_to_nine quarter_to_eleven",
    "thing": "anchor basket bicycle blanket bottle bracelet bucket camera candle carpet chair clock coat compass cup drill "
    "earrings fan globe gloves guitar hammer hat helmet jacket kettle kite ladder lamp lantern mirror mug "
    "necklace notebook oven paintbrush pan pen pillow plate purse radio ring rope saddle scarf scissors shovel "
    "sofa spoon stove suitcase teapot telescope tent ticket toolbox torch umbrella vase violin wallet watch",
    "place": "attic balcony basement bathroom bedroom cellar cupboard desk drawer garage garden hall kitchen library "
    "office pantry porch shed stable studio study wardrobe workshop",
}  # fmt: skip
SHARED = ("colour", "day", "month", "time", "animal", "place")  # closed sets: both splits draw from all of them
# value kind; what is said; what is asked; what is answered. {v} the value, {p} the person it is about, {t} a thing
RELATIONS: list[tuple[str, list[str], list[str], str]] = [
    ("name", ["My name is {v}.", "I am {v}.", "Hello, I am called {v}."], ["What is my name?", "Who am I?"],
     "Your name is {v}."),
    ("city", ["I live in {v}.", "My home is in {v}.", "I have a flat in {v}."],
     ["Where do I live?", "In which city do I live?"], "You live in {v}."),
    ("city", ["I was born in {v}.", "I come from {v}, where I was born."], ["Where was I born?"], "You were born in {v}."),
    ("pet_name", ["My cat is called {v}.", "I have a cat named {v}.", "Our cat's name is {v}."],
     ["What is my cat called?", "What is the name of my cat?"], "Your cat is called {v}."),
    ("pet_name", ["My dog is called {v}.", "I have a dog named {v}."],
     ["What is my dog called?", "What is the name of my dog?"], "Your dog is called {v}."),
    ("name", ["My sister is called {v}.", "I have a sister, {v}.", "My sister {v} is older than me."],
     ["What is my sister called?", "What is the name of my sister?"], "Your sister is called {v}."),
    ("name", ["My brother is called {v}.", "My brother {v} visits me often."],
     ["What is my brother called?", "What is my brother's name?"], "Your brother is called {v}."),
    ("name", ["My best friend is {v}.", "{v} is my best friend."], ["Who is my best friend?"], "Your best friend is {v}."),
    ("name", ["I am married to {v}.", "My husband is called {v}."], ["Who am I married to?"], "You are married to {v}."),
    ("name", ["My boss is called {v}.", "At work, {v} is my boss."], ["Who is my boss?"], "Your boss is {v}."),
    ("job", ["I work as a {v}.", "I earn my living as a {v}.", "By profession I am a {v}."],
     ["What is my job?", "What do I work as?"], "You work as a {v}."),
    ("food", ["My favourite food is {v}.", "I like {v} more than any other food."],
     ["What is my favourite food?", "What do I like to eat most?"], "Your favourite food is {v}."),
    ("food", ["I am allergic to {v}.", "I cannot eat {v}, since I am allergic."], ["What am I allergic to?"],
     "You are allergic to {v}."),
    ("food", ["For dinner we had {v}.", "Last night we ate {v} for dinner."], ["What did we have for dinner?"],
     "You had {v} for dinner."),
    ("instrument", ["I play the {v}.", "Every evening I practise the {v}."], ["Which instrument do I play?"],
     "You play the {v}."),
    ("hobby", ["My favourite sport is {v}.", "The sport I like best is {v}."], ["What is my favourite sport?"],
     "Your favourite sport is {v}."),
    ("language", ["I am learning {v}.", "This year I began to learn {v}."], ["Which language am I learning?"],
     "You are learning {v}."),
    ("colour", ["My favourite colour is {v}.", "Of all colours I like {v} best."], ["What is my favourite colour?"],
     "Your favourite colour is {v}."),
    ("colour", ["My car is {v}.", "I drive a {v} car."], ["What colour is my car?"], "Your car is {v}."),
    ("colour", ["We painted our door {v}.", "The door of our house is {v}."], ["What colour is our door?"],
     "Your door is {v}."),
    ("animal", ["I keep a {v} at home.", "The pet I have is a {v}."], ["What kind of pet do I have?"],
     "You have a {v}."),
    ("day", ["My piano lesson is on {v}.", "I have a piano lesson every {v}."], ["On which day is my piano lesson?"],
     "Your piano lesson is on {v}."),
    ("day", ["The meeting is on {v}.", "We meet on {v} to talk about the plan."], ["On which day is the meeting?"],
     "The meeting is on {v}."),
    ("month", ["My birthday is in {v}.", "I was born in the month of {v}."], ["In which month is my birthday?"],
     "Your birthday is in {v}."),
    ("month", ["We are going on holiday in {v}.", "Our holiday is in {v}."], ["In which month is our holiday?"],
     "Your holiday is in {v}."),
    ("time", ["My bus leaves at {v}.", "Every morning I take the bus at {v}."], ["When does my bus leave?"],
     "Your bus leaves at {v}."),
    ("time", ["The dentist expects me at {v}.", "I have to be at the dentist's at {v}."],
     ["When do I have to be at the dentist's?"], "You have to be there at {v}."),
    ("number", ["I am {v} years old.", "I turned {v} last week."], ["How old am I?"], "You are {v} years old."),
    ("number", ["My room number is {v}.", "I stay in room {v}."], ["What is my room number?"], "Your room number is {v}."),
    ("code", ["The code for the door is {v}.", "You open the door with the code {v}."], ["What is the code for the door?"],
     "The code for the door is {v}."),
    ("thing", ["I lost my {v} yesterday.", "Yesterday my {v} got lost."], ["What did I lose?"], "You lost your {v}."),
    ("thing", ["I bought a {v} for my mother.", "My mother gets a {v} from me."], ["What did I buy for my mother?"],
     "You bought a {v} for your mother."),
    ("city", ["{p} lives in {v}.", "{p} has moved to {v}."], ["Where does {p} live?"], "{p} lives in {v}."),
    ("job", ["{p} works as a {v}.", "{p} is a {v}."], ["What is {p}'s job?"], "{p} works as a {v}."),
    ("hobby", ["{p} likes {v}.", "In the evening {p} goes in for {v}."], ["What does {p} like?"], "{p} likes {v}."),
    ("instrument", ["{p} plays the {v}.", "{p} has a new {v}."], ["Which instrument does {p} play?"], "{p} plays the {v}."),
    ("food", ["{p} brought {v} to the party.", "At the party there were {v}, from {p}."], ["What did {p} bring to the party?"],
     "{p} brought {v}."),
    ("place", ["The {t} is in the {v}.", "I put the {t} in the {v}."], ["Where is the {t}?"], "The {t} is in the {v}."),
    ("colour", ["The {t} is {v}.", "I have a {v} {t}."], ["What colour is the {t}?"], "The {t} is {v}."),
    ("name", ["The {t} belongs to {v}.", "{v} owns the {t}."], ["Who owns the {t}?"], "The {t} belongs to {v}."),
]  # fmt: skip
FILLER = [
    "It rained all day today.",
    "I slept badly last night.",
    "The weather is fine.",
    "Let us talk about something else.",
    "I will tell you a little more.",
    "That reminds me of something.",
    "Work was tiring this week.",
    "I had a long walk this morning.",
    "By the way, thank you for listening.",
    "The news was dull today.",
    "I need a holiday.",
    "It is getting dark outside.",
]
REPLIES = [
    "Nice to hear.",
    "Thank you for telling me.",
    "I see.",
    "Good to know.",
    "Okay.",
    "I will remember that.",
    "Noted!",
    "That sounds good.",
    "How interesting.",
]


@dataclass(frozen=True)
class Talk:
    """Messages with facts, and questions about them.

    Args:
        messages: chat messages, each a context c(j).
        questions: question and answer of each fact asked for.
        values: what has to be in each answer.
    """

    messages: list[dict[str, str]]
    questions: list[tuple[str, str]]
    values: list[str]


def talks(split: str, n: int, seed: int, facts: tuple[int, int] = (3, 8), asked: int = 4) -> list[Talk]:
    """`n` conversations of a split, the same ones for the same seed.

    Args:
        split: one of `SPLITS`.
        n: conversations.
        seed: chooses facts, values and words.
        facts: how many a conversation holds, from and to.
        asked: questions of each at most.
    """
    rng = random.Random(f"{split} {seed}")
    return [_talk(split, rng, rng.randint(*facts), asked) for _ in range(n)]


def values(kind: str, split: str) -> list[str]:
    """The values of a kind that a split draws from: every third is a test value."""
    every = [value.replace("_", " ") for value in VALUES[kind].split()]
    if kind in SHARED:
        return every
    return [value for index, value in enumerate(every) if (index % 3 == 2) == (split == "test")]


def _talk(split: str, rng: random.Random, count: int, asked: int) -> Talk:
    people, things = rng.sample(values("name", split), 8), rng.sample(values("thing", split), 8)
    told: list[str] = []
    questions, found = [], []
    for kind, said, asks, answer in rng.sample(RELATIONS, count):
        words = {"v": _value(kind, split, rng), "p": people.pop(), "t": things.pop()}
        told.append(rng.choice(said).format(**words))
        questions.append((rng.choice(asks).format(**words), answer.format(**words)))
        found.append(words["v"])
    messages = []
    while told:
        said_now = [told.pop(0) for _ in range(2 if len(told) > 1 and rng.random() < 0.25 else 1)]
        if rng.random() < 0.1:
            said_now.insert(rng.randint(0, len(said_now)), rng.choice(FILLER))
        messages.append({"role": "user", "content": " ".join(said_now)})
        if rng.random() < 0.2:
            messages.append({"role": "assistant", "content": rng.choice(REPLIES)})
    order = rng.sample(range(count), min(asked, count))
    return Talk(messages, [questions[k] for k in order], [found[k] for k in order])


def _value(kind: str, split: str, rng: random.Random) -> str:
    if kind == "number":
        return str(rng.randint(11, 99))
    if kind == "code":
        return f"{rng.choice(values('colour', split))} {rng.choice(values('animal', split))}"
    if kind in ("name", "pet_name", "city") and rng.random() < 0.2:
        return made_up_word(rng).title()
    return rng.choice(values(kind, split))


def ids_of(talk: Talk, tokenizer: Any) -> tuple[list[list[int]], list[list[tuple[list[int], bool]]]]:
    """Contexts as ids, and per question its pieces of ids with whether they are learned.

    Returns:
        c(1), c(2), ... as `CompressedContextMemory.append` would encode them; for each question (ids, learned) pieces: question
        and opening of the answer, the answer with its end.
    """
    from hf_dataopt.ccm.turns import answer_prompt, encode_turn

    contexts = [encode_turn(tokenizer, message, index == 0) for index, message in enumerate(talk.messages)]
    opening = answer_prompt(tokenizer)
    end = tokenizer.eos_token_id
    asked = []
    for question, answer in talk.questions:
        heard = encode_turn(tokenizer, {"role": "user", "content": question}, False)
        said = tokenizer(answer, add_special_tokens=False)["input_ids"]
        asked.append([([*heard, *opening], False), ([*said, end], True)])
    return contexts, asked
