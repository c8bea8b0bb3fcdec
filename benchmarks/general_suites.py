"""Write the rows of the suites of general ability that come from templates.

    python -m benchmarks.general_suites

The same seed gives the same files. The rows of `refusal` are written by hand, in their file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from deal_core.general.suites import ROWS_FOLDER

SEED = 51
NAMES = (
    "Maria Lopez", "Kenji Tanaka", "Amara Okafor", "Lena Fischer", "Oscar Lindqvist", "Priya Nair", "Tom Barker",
    "Ines Duarte", "Yusuf Demir", "Chloe Martin", "Ravi Patel", "Hanna Kovacs", "Diego Romero", "Mei Chen",
    "Samuel Adeyemi", "Greta Olsen",
)  # fmt: skip
CITIES = (
    "Lima", "Osaka", "Lagos", "Berlin", "Oslo", "Mumbai", "Leeds", "Porto", "Izmir", "Lyon", "Toronto", "Budapest",
    "Bogota", "Taipei", "Accra", "Bergen",
)  # fmt: skip
JOBS = ("nurse", "carpenter", "pilot", "teacher", "baker", "surveyor", "plumber", "librarian")
ITEMS = ("lamp", "kettle", "backpack", "notebook", "umbrella", "teapot", "ladder", "blanket", "bicycle bell", "mirror")
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "grey", "brown")

Row = dict[str, Any]


def row(prompt: str, checks: dict[str, Any], answer: str) -> Row:
    """A row: what is asked, what an answer has to pass, and an answer that passes."""
    return {"prompt": prompt, "checks": checks, "answer": answer}


def arithmetic(draw: random.Random) -> Iterator[Row]:
    """80 sums, from one step to three."""

    def asked(question: str, result: float) -> Row:
        return row(f"{question} Answer with the number only.", {"number": result}, f"{result:g}")

    for _ in range(16):
        a, b = draw.randint(3, 60), draw.randint(3, 39)
        yield asked(f"What is {a} + {b}?", a + b)
    for _ in range(12):
        a = draw.randint(20, 99)
        b = draw.randint(2, a - 3)
        yield asked(f"What is {a} - {b}?", a - b)
    for _ in range(12):
        a, b = draw.randint(2, 12), draw.randint(2, 12)
        yield asked(f"What is {a} × {b}?", a * b)
    for _ in range(8):
        a, b = draw.randint(2, 12), draw.randint(2, 12)
        yield asked(f"What is {a * b} divided by {b}?", a)
    for _ in range(8):
        a, b, c = draw.randint(2, 9), draw.randint(2, 9), draw.randint(1, 20)
        yield asked(f"What is {a} × {b} + {c}?", a * b + c)
    for _ in range(6):
        item, number, price = draw.choice(ITEMS), draw.randint(2, 9), draw.randint(2, 15)
        yield asked(f"One {item} costs {price} euros. How many euros do {number} of them cost?", number * price)
    for _ in range(6):
        name, has, gives = draw.choice(NAMES).split()[0], draw.randint(12, 40), draw.randint(2, 10)
        question = f"{name} has {has} stamps and gives {gives} of them away. How many stamps are left?"
        yield asked(question, has - gives)
    for _ in range(4):
        hours, minutes = draw.randint(2, 6), draw.choice((10, 15, 20, 45))
        yield asked(f"How many minutes are {hours} hours and {minutes} minutes?", 60 * hours + minutes)
    for _ in range(4):
        percent, of = draw.choice((10, 20, 25, 50)), draw.choice((40, 80, 120, 200, 260))
        yield asked(f"What is {percent} percent of {of}?", percent * of / 100)
    for _ in range(4):
        a, b, c = draw.randint(10, 30), draw.randint(5, 20), draw.randint(3, 9)
        question = f"A bus starts with {a} people. At the first stop {b} get on, and {c} get off. How many are inside?"
        yield asked(question, a + b - c)


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


def _is(value: Any) -> dict[str, Any]:
    return {"const": value}


def json_by_schema(draw: random.Random) -> Iterator[Row]:
    """60 objects and lists to write, by facts in a sentence."""

    def asked(question: str, schema: dict[str, Any], answer: Any) -> Row:
        return row(f"{question} Answer with JSON only.", {"json": schema}, json.dumps(answer))

    for _ in range(12):
        name, city, age = draw.choice(NAMES), draw.choice(CITIES), draw.randint(19, 78)
        yield asked(
            f"{name} is {age} years old and lives in {city}. Write a JSON object with the keys name (text), age "
            "(whole number) and city (text).",
            _object(name=_is(name), age=_is(age), city=_is(city)),
            {"name": name, "age": age, "city": city},
        )
    for _ in range(10):
        item, price, stock = draw.choice(ITEMS), draw.randint(3, 90) + draw.choice((0.5, 0.25)), draw.random() < 0.5
        has = "is" if stock else "is not"
        yield asked(
            f"The {item} costs {price:.2f} dollars and {has} in stock. Write a JSON object with the keys item (text), "
            "price (number) and in_stock (true or false).",
            _object(item=_is(item), price=_is(price), in_stock=_is(stock)),
            {"item": item, "price": price, "in_stock": stock},
        )
    for _ in range(10):
        chosen = draw.sample(COLOURS, draw.randint(3, 5))
        yield asked(
            f"Write a JSON list of these colours, in this order: {', '.join(chosen)}.",
            {"type": "array", "const": chosen},
            chosen,
        )
    for _ in range(8):
        (first, second), (a, b) = draw.sample(NAMES, 2), draw.sample(range(20, 70), 2)
        people = [{"name": first, "age": a}, {"name": second, "age": b}]
        yield asked(
            f"{first} is {a} and {second} is {b}. Write a JSON list with an object for each person, in this order. Its "
            "keys are name (text) and age (whole number).",
            {
                "type": "array",
                "minItems": 2,
                "maxItems": 2,
                "items": _object(name={"enum": [first, second]}, age={"enum": [a, b]}),
            },
            people,
        )
    for _ in range(8):
        name, job, city, zipped = draw.choice(NAMES), draw.choice(JOBS), draw.choice(CITIES), draw.randint(10000, 99999)
        yield asked(
            f"{name} is a {job} in {city}, postal code {zipped}. Write a JSON object with the keys name (text), job "
            "(text) and address. The address is an object with the keys city (text) and postal_code (text).",
            _object(name=_is(name), job=_is(job), address=_object(city=_is(city), postal_code=_is(str(zipped)))),
            {"name": name, "job": job, "address": {"city": city, "postal_code": str(zipped)}},
        )
    for _ in range(6):
        mood, number = draw.choice(("positive", "negative", "neutral")), draw.randint(1, 5)
        yield asked(
            f"A review is {mood} and gives {number} of 5 stars. It names no author. Write a JSON object with the keys "
            "sentiment (positive, negative or neutral), stars (whole number) and author (text or null).",
            _object(sentiment=_is(mood), stars=_is(number), author=_is(None)),
            {"sentiment": mood, "stars": number, "author": None},
        )
    for _ in range(6):
        name, items = draw.choice(NAMES), draw.sample(ITEMS, draw.randint(2, 3))
        yield asked(
            f"{name} orders: {', '.join(items)}. Write a JSON object with the keys customer (text), items (list of "
            "texts) and count (whole number of items).",
            _object(customer=_is(name), items=_is(items), count=_is(len(items))),
            {"customer": name, "items": items, "count": len(items)},
        )


FUNCTIONS = {
    "get_weather": 'get_weather(city: text, unit: "celsius" or "fahrenheit")',
    "send_email": "send_email(to: text, subject: text)",
    "set_timer": "set_timer(minutes: whole number)",
    "convert_currency": "convert_currency(amount: number, from: text, to: text)",
    "add_to_cart": "add_to_cart(item: text, quantity: whole number)",
    "book_table": "book_table(restaurant: text, people: whole number, time: text)",
    "turn_on_light": "turn_on_light(room: text)",
    "play_song": "play_song(title: text)",
    "find_train": "find_train(from: text, to: text)",
}


def _requests(draw: random.Random) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """For each call a request in words, the name of the function, and the arguments."""
    rooms = ("kitchen", "bedroom", "hall", "garage", "bathroom", "office")
    songs = ("Yesterday", "Moon River", "Blue Suede Shoes", "Imagine", "Dancing Queen", "Hallelujah")
    places = ("Trattoria Roma", "The Old Mill", "Green Garden", "Blue Harbour", "Casa Luna", "Corner House")
    subjects = ("Invoice", "Holiday plans", "Meeting notes", "Budget", "Lost keys", "New address")
    for place in range(7):
        city, unit = draw.choice(CITIES), ("celsius", "fahrenheit")[place % 2]
        yield f"How warm is it in {city}, in {unit}?", "get_weather", {"city": city, "unit": unit}
    for place in range(6):
        to = f"{draw.choice(NAMES).split()[0].lower()}@example.org"
        subject = subjects[place]
        yield f"Send {to} an email with the subject {subject}.", "send_email", {"to": to, "subject": subject}
    for minutes in draw.sample(range(3, 55), 6):
        yield f"Wake me in {minutes} minutes.", "set_timer", {"minutes": minutes}
    for _ in range(7):
        amount = draw.randint(2, 90) * 5
        source, target = draw.sample(("EUR", "USD", "JPY", "GBP", "NOK"), 2)
        words = f"How much are {amount} {source} in {target}?"
        yield words, "convert_currency", {"amount": amount, "from": source, "to": target}
    for _ in range(7):
        item, number = draw.choice(ITEMS), draw.randint(2, 9)
        yield f"Put {number} of the item {item} into my cart.", "add_to_cart", {"item": item, "quantity": number}
    for place in places:
        people, time = draw.randint(2, 8), f"{draw.randint(18, 21)}:{draw.choice(('00', '15', '30', '45'))}"
        words = f"Get us a table at {place} for {people} people at {time}."
        yield words, "book_table", {"restaurant": place, "people": people, "time": time}
    for room in rooms:
        yield f"It is too dark in the {room}.", "turn_on_light", {"room": room}
    for song in songs:
        yield f"I want to hear {song}.", "play_song", {"title": song}
    for _ in range(9):
        source, target = draw.sample(CITIES, 2)
        yield f"How do I get from {source} to {target} by train?", "find_train", {"from": source, "to": target}


def tools(draw: random.Random) -> Iterator[Row]:
    """60 requests that one of three functions answers."""
    for words, name, arguments in _requests(draw):
        offered = [name, *draw.sample([other for other in FUNCTIONS if other != name], 2)]
        draw.shuffle(offered)
        listed = "\n".join(FUNCTIONS[each] for each in offered)
        call = {"name": name, "arguments": arguments}
        yield row(
            f'You can call one of these functions:\n{listed}\nAnswer with one JSON object with the keys "name" (the '
            f'function) and "arguments" (an object), and nothing else.\nRequest: {words}',
            {"call": call},
            json.dumps(call),
        )


def instructions(draw: random.Random) -> Iterator[Row]:
    """80 requests with constraints that a program can check. Each asks for some content too."""
    topics = {
        "rain": "Rain falls from heavy clouds and fills the rivers again",
        "bread": "Bread is baked from flour and water in a hot oven",
        "winter": "Winter brings short days and cold nights with snow",
        "the sea": "The sea is wide and salty and moves with the moon",
        "trains": "Trains carry many people quickly between large cities",
        "bees": "Bees collect nectar and turn it into sweet honey",
        "libraries": "Libraries lend books to everybody for a few weeks",
        "mountains": "Mountains rise slowly where two plates push together",
        "coffee": "Coffee is brewed from roasted beans and hot water",
        "football": "Football is played by two teams on a green field",
    }

    def about(topic: str) -> str:
        return topic.split()[-1]

    names = [*topics]
    for topic in names:  # the word itself, and a number of words
        most = draw.randint(12, 18)
        yield row(
            f'Write one sentence about {topic} with at most {most} words. Use the word "{about(topic)}".',
            {"contains": [about(topic)], "num_words": [4, most]},
            f"{topics[topic]}.",
        )
    for topic in names:
        yield row(
            f'Write a sentence about {topic} in capital letters only. Use the word "{about(topic).upper()}".',
            {"contains": [about(topic)], "case": "upper", "num_words": [4, 60]},
            f"{topics[topic]}.".upper(),
        )
    for topic in names:
        letter_case = f"{topics[topic]}.".lower()
        yield row(
            f'Write a sentence about {topic} without any capital letter. Use the word "{about(topic)}".',
            {"contains": [about(topic)], "case": "lower", "num_words": [4, 60]},
            letter_case,
        )
    kinds = {
        "animals": "dog, cat, horse, cow, sheep, goat",
        "fruits": "apple, pear, plum, cherry, melon, grape",
        "countries": "Spain, Japan, Kenya, Chile, Norway, Egypt",
        "musical instruments": "piano, violin, flute, drum, guitar, harp",
        "vegetables": "carrot, onion, leek, potato, cabbage, pea",
        "tools": "hammer, saw, drill, file, chisel, wrench",
        "sports": "tennis, golf, judo, rowing, boxing, hockey",
        "trees": "oak, birch, pine, maple, willow, elm",
        "colours": "red, blue, green, white, black, pink",
        "professions": "baker, nurse, pilot, farmer, judge, tailor",
    }
    for kind, members in kinds.items():
        number = draw.randint(3, 5)
        some = members.split(", ")[:number]
        yield row(
            f"Name exactly {number} {kind}. Separate them by commas, on one line, and write nothing else.",
            {"num_items": number, "num_lines": 1, "num_words": [number, 3 * number]},
            ", ".join(some),
        )
    for kind, members in kinds.items():
        number = draw.randint(3, 5)
        some = members.split(", ")[:number]
        yield row(
            f'List exactly {number} {kind}, one on each line. Begin each line with "- " and write nothing else.',
            {"num_lines": number, "lines_start": "- ", "num_words": [number, 5 * number]},
            "\n".join(f"- {member}" for member in some),
        )
    ends = ("That is all.", "Thank you.", "The end.", "Have a nice day.", "See you soon.")
    for place, topic in enumerate(names):
        end = ends[place % len(ends)]
        yield row(
            f'Write two sentences about {topic}. Then end your answer with the exact words "{end}"',
            {"contains": [about(topic)], "ends": end, "num_words": [8, 90]},
            f"{topics[topic]}. People like it. {end}",
        )
    starts = ("Dear reader,", "In short,", "Surprisingly,", "Once upon a time,", "Listen:")
    for place, topic in enumerate(names):
        start = starts[place % len(starts)]
        yield row(
            f'Begin your answer with the exact words "{start}" and write one or two sentences about {topic}.',
            {"contains": [about(topic)], "starts": start, "num_words": [5, 90]},
            f"{start} {topics[topic].lower()}.",
        )
    avoided = {
        "rain": "water", "bread": "bake", "winter": "cold", "the sea": "blue", "trains": "fast", "bees": "flower",
        "libraries": "read", "mountains": "high", "coffee": "drink", "football": "ball",
    }  # fmt: skip
    for topic in names:
        word = avoided[topic]
        answer = f"I have liked {topic} since I was a child."
        yield row(
            f'Write one sentence about {topic}. Use the word "{about(topic)}", and do not use the word "{word}".',
            {"contains": [about(topic)], "avoids": [word], "num_words": [4, 60]},
            answer,
        )


GENERATED: dict[str, Callable[[random.Random], Iterator[Row]]] = {
    "arithmetic": arithmetic,
    "instructions": instructions,
    "json": json_by_schema,
    "tools": tools,
}


def content(suite: str) -> str:
    """The file of a suite: its rows as JSON, one on each line. Of equal requests one stays."""
    draw = random.Random(f"{suite} {SEED}")
    drawn = [*GENERATED[suite](draw)]
    rows = {each["prompt"]: each for each in drawn}
    while len(rows) < len(drawn):
        missing = len(drawn) - len(rows)
        more = {each["prompt"]: each for each in GENERATED[suite](draw) if each["prompt"] not in rows}
        rows |= dict([*more.items()][:missing])
    return "".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in rows.values())


if __name__ == "__main__":
    for suite in GENERATED:
        (ROWS_FOLDER / f"{suite}.jsonl").write_text(content(suite), encoding="utf-8")
