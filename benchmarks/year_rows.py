"""Messages to a city's five departments, made by a seeded generator: the rows of `benchmarks.year`.

A message is an opening, what happened, a place or time, and a closing. What happened decides the label. Each label has
eight wordings of it. The first arrival of a task brings four of them, and later arrivals bring all, so that a task can
gain from a second arrival. Test rows have all wordings.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

Wordings = Literal["first", "all"]
NUM_FIRST = 4

OPENINGS = (
    "",
    "Good morning, ",
    "Hello, ",
    "Once more: ",
    "As I said on the phone, ",
    "Sorry to bother you again, but ",
    "I am writing for my mother: ",
    "Note from the front desk: ",
    "Caller reports: ",
    "We live in the old town, and ",
    "Third message this week: ",
    "To whom it may concern: ",
)
PLACES = (
    "near the station",
    "in Mill Lane",
    "at the corner of Harbour Street",
    "behind the market hall",
    "at number 14",
    "on the north side",
    "by the river",
    "in the new quarter",
    "since Tuesday",
    "since last week",
    "again this morning",
    "for a month now",
    "on the eve of the holiday",
    "after the storm",
)
CLOSINGS = (
    "",
    " Please call back before noon.",
    " A photo is attached.",
    " My neighbours say the same.",
    " What should I do?",
    " Thank you for your patience.",
    " I would like an answer in writing.",
    " This cannot go on.",
    " The form on your page does not work.",
    " My number is on file.",
    " There is no hurry.",
    " Who is in charge of this?",
)
TASKS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "transit": {
        "delay": (
            "the tram came forty minutes after its time",
            "bus 12 was so late that I missed my train",
            "I stood in the rain while two departures on the board never came",
            "the ferry left an hour behind the timetable",
            "line 4 keeps its passengers waiting every evening",
            "nothing arrived between seven and half past eight",
            "the replacement coach turned up long after the announced minute",
            "my connection was gone because we crawled all the way",
        ),
        "lost item": (
            "I left my umbrella on the upper deck",
            "my son forgot his trumpet on the seat",
            "a black rucksack must have stayed under the bench of the tram",
            "has anybody handed in a pair of glasses",
            "my purse slipped out of my coat while I got off",
            "the conductor may have picked up a blue scarf",
            "a child's bicycle helmet did not come home with us",
            "I am looking for a folder of drawings that rode on without me",
        ),
        "ticket problem": (
            "the machine kept my note and printed nothing",
            "my monthly pass is refused by the gate",
            "the app charged me twice for one ride",
            "the reduced fare for pupils is not offered any more",
            "the validator stamped the wrong day",
            "I paid for zone B and was told it is zone C",
            "the code on my phone cannot be read by the scanner",
            "my season card expired although it runs until June",
        ),
        "rude driver": (
            "the man at the wheel shouted at an old lady",
            "he closed the doors in front of us and laughed",
            "the driver smoked and told me to mind my own business",
            "I was called names because I asked for the ramp",
            "he drove off while my daughter was still on the step",
            "the woman in uniform made fun of my accent",
            "he braked hard on purpose and grinned into the mirror",
            "the person on duty refused to say a word to a blind passenger",
        ),
        "broken stop": (
            "the glass of the shelter is smashed",
            "the bench has lost two of its boards",
            "the display shows only zeros",
            "the lamp over the platform is dark",
            "the timetable was torn out of its frame",
            "the roof drips on those who wait",
            "somebody has bent the sign so that nobody can read it",
            "weeds and rubble cover the kerb where we get on",
        ),
    },
    "water": {
        "leak": (
            "water runs out of the pavement",
            "a pipe in the cellar drips day and night",
            "the hydrant sprays the whole crossing",
            "there is a puddle over the main that never dries",
            "it hisses under the road and the asphalt sinks",
            "the joint before the counter is wet all the time",
            "a small stream comes up between the cobbles",
            "our wall is soaked from the supply line",
        ),
        "no water": (
            "nothing comes out of the tap",
            "the whole staircase has been dry from early on",
            "we cannot flush or cook, the pipes are empty",
            "only air comes when I open the shower",
            "the supply stopped without a warning",
            "the fifth floor gets not a drop",
            "the kettle stays empty, as it did yesterday",
            "the school had to send the children home because the taps were dead",
        ),
        "high bill": (
            "you want three times as much money as last year",
            "the amount on the invoice cannot be right for one person",
            "I was away for half a year and shall pay 600",
            "the instalment went up without a reason",
            "the sum you deducted is far above our agreement",
            "for a garden of this size the charge is absurd",
            "the statement asks 410 from a couple that hardly bathes",
            "your letter demands more than my rent",
        ),
        "bad taste": (
            "it smells of chlorine",
            "the tea tastes of metal",
            "what we drink is brown in the glass",
            "there is sand in the filter and a flavour of earth",
            "the baby's bottle has a smell of swimming pool",
            "it leaves a bitter film on the tongue",
            "white flakes float in the jug",
            "the coffee is spoiled, something rotten is in it",
        ),
        "meter reading": (
            "the counter stands at 00482",
            "I want to tell you the number on my dial",
            "nobody was at home when your reader came",
            "where do I enter this year's figure",
            "the little wheel shows 1,207 cubic metres",
            "the card for the value got lost, so here it is: 733",
            "please note the state of the device for our move: 96",
            "your page does not accept the digits from my box",
        ),
    },
    "library": {
        "renewal": (
            "I need the atlas for two more weeks",
            "please extend the three novels on my list",
            "can I keep the cookbook a little longer",
            "the due date of my audio books has to move",
            "my thesis takes longer, so prolong everything",
            "the button to extend is grey for the travel guide",
            "is a second extension of the grammar possible",
            "I have not finished volume two and would hold on to it",
        ),
        "fine": (
            "why do I owe 8.40",
            "the reminder fee is wrong, I was on time",
            "you charge for a film that I gave back in May",
            "two euros for one day seem too much",
            "I paid the penalty at the desk, and it still shows",
            "my account is blocked because of 60 cents",
            "the damage to the cover was there before, so I will not pay",
            "remove the late charge, the book drop was full",
        ),
        "reservation": (
            "put my name down for the new thriller",
            "is the game I ordered ready to pick up",
            "how many people are before me in the queue for the biography",
            "please keep the score of the opera for me",
            "I ordered a title from the other branch",
            "cancel my request for the crime series",
            "tell me when the magazine that is out comes back",
            "somebody else took the copy that was set aside for me",
        ),
        "opening hours": (
            "are you there on Saturday afternoon",
            "until when is the reading room open",
            "is the children's floor closed during the holidays",
            "the door was locked at ten",
            "do you open on the day after Christmas",
            "when can pupils come in before school",
            "how late may one study in the basement",
            "the sign says Monday and the page says Tuesday",
        ),
        "new card": (
            "we have just moved here and would like to borrow",
            "my daughter turns six and wants to sign up",
            "what papers do I bring to become a member",
            "the plastic broke in two, so I need another",
            "is there a pass for a whole family",
            "my wallet was stolen with the membership in it",
            "can a refugee without an address register",
            "how do I join as a student from abroad",
        ),
    },
    "housing": {
        "heating": (
            "the radiators are cold",
            "it is 15 degrees in the nursery",
            "the boiler makes a noise and goes out",
            "we sit in coats in the living room",
            "the thermostat has no effect",
            "only the upper half of the panel gets warm",
            "the burner shows an error and the house cools down",
            "we bought an electric stove because nothing else warms us",
        ),
        "noise": (
            "the people above us dance until three",
            "a dog barks all day behind the wall",
            "drilling starts at six on Sundays",
            "the bar in the yard plays music at night",
            "children race on scooters over our heads",
            "somebody practises drums after ten",
            "a pump hums so that we cannot sleep",
            "there are shouts and slammed doors in the stairwell every weekend",
        ),
        "rent": (
            "I cannot pay the full amount in July",
            "the increase in your letter is above the limit",
            "the transfer for the flat came back",
            "please explain the extra 40 a month",
            "may I pay in two parts this time",
            "the deposit has not been returned",
            "the office helps me with the costs and needs your form",
            "you took the money for the garage that I gave up",
        ),
        "repair": (
            "the kitchen window does not close",
            "the lock of the front door jams",
            "a tile has come off and the wall crumbles",
            "the lift stands still between two floors",
            "the socket in the hall sparks",
            "the toilet runs and cannot be stopped",
            "the handrail is loose and someone will fall",
            "the bell is dead and the parcel man leaves",
        ),
        "moving out": (
            "we give up the flat in spring",
            "when can the keys be handed over",
            "must the walls be white when we leave",
            "I have found a tenant to follow me",
            "how long is the notice after nine years",
            "who looks at the rooms on the last day",
            "we end the contract and go to another town",
            "can the new family take over our carpets",
        ),
    },
    "waste": {
        "missed pickup": (
            "the grey bin was not emptied",
            "the lorry drove past our house",
            "paper still stands in front of every door",
            "they took the yellow bags of all but us",
            "the organic tub is full and stinks, nobody came",
            "the crew left half the street",
            "we put it out in time and found it full in the evening",
            "the collection of our row was forgotten twice",
        ),
        "bulky items": (
            "an old sofa has to go",
            "can you fetch two mattresses",
            "where do I register a wardrobe",
            "the fridge of my aunt needs to be taken away",
            "we cleared the attic and have a whole load",
            "is a piano accepted",
            "how many pieces of furniture are free each year",
            "a broken washing machine waits in the yard",
        ),
        "container": (
            "we need a larger bin for six people",
            "the lid is broken off",
            "a wheel is missing, so I drag it",
            "please send a brown one for the garden",
            "our tub was stolen",
            "I would like to share one with the house next door",
            "the lock does not open with the key any more",
            "take the second one back, we are fewer now",
        ),
        "illegal dumping": (
            "someone has thrown tyres into the ditch",
            "there is a heap of rubble in the wood",
            "cans of paint stand beside the glass bank",
            "a van unloads bags in the dark",
            "the playground is full of broken tiles",
            "strangers leave their kitchen scraps at the pond",
            "a car without plates rots on the meadow",
            "I saw a man tip asbestos over the fence",
        ),
        "calendar": (
            "when is the next day for glass",
            "does the plan change in the week of the holiday",
            "the leaflet with the dates did not come",
            "is it paper or plastic on Friday",
            "can the app remind me the evening before",
            "which week is ours in the new schedule",
            "send me the dates of the year on paper",
            "the list on your page ends in March",
        ),
    },
}
"""Task → label → wordings."""
INSTRUCTION = "What is the following message to the {department} about? Choose one from the option."
DEPARTMENTS = {
    "transit": "transport company",
    "water": "waterworks",
    "library": "library",
    "housing": "housing office",
    "waste": "waste collection",
}


def messages(task: str, num_rows: int, seed: str, wordings: Wordings = "all") -> Iterator[dict[str, str]]:
    """Yield messages of a task with their labels, columns text and label. The labels take turns; no text comes twice.

    Args:
        task: one of TASKS.
        num_rows: how many.
        seed: another seed gives other messages, the same seed the same ones.
        wordings: first, the first NUM_FIRST of each label; or all.
    """
    draw, seen = random.Random(f"{task} {seed}"), set[str]()
    while len(seen) < num_rows:
        label = [*TASKS[task]][len(seen) % len(TASKS[task])]
        known = TASKS[task][label][: NUM_FIRST if wordings == "first" else None]
        opening = draw.choice(OPENINGS)
        happened = draw.choice(known)
        text = f"{opening}{happened if opening else happened[0].upper() + happened[1:]} {draw.choice(PLACES)}."
        text += draw.choice(CLOSINGS)
        if text not in seen:
            seen.add(text)
            yield {"text": text, "label": label}


def slipped(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Give each row the label of the row before it, and the first row that of the last one."""
    return [{**row, "label": before["label"]} for before, row in zip([rows[-1], *rows[:-1]], rows, strict=True)]
