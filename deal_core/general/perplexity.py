"""General ability: how well a model still predicts plain English that belongs to no task."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from deal_core.base_model.language_model import LanguageModel, device_of

TEXTS = (
    "The lighthouse keeper climbed the stairs every evening at the same hour. There were two hundred and twelve of "
    "them, and after thirty years he no longer counted. At the top he wiped the glass, trimmed the lamp, and wrote "
    "a line in the book: the wind, the height of the waves, the ships he had seen. Nobody had read the book since "
    "his father died, but he kept it as carefully as ever. On clear nights he could make out the lights of the town "
    "across the bay, and he sometimes wondered what the people there were having for supper.",
    "Bread needs only flour, water, salt and time. Mix three cups of flour with a little more than one cup of warm "
    "water, a spoonful of salt and a pinch of yeast. Stir until no dry flour is left, cover the bowl, and leave it "
    "on the table overnight. In the morning the dough will have doubled and will be full of bubbles. Fold it a few "
    "times, let it rest for an hour, and bake it in a very hot oven inside a heavy pot with the lid on. After half "
    "an hour, take the lid off so that the crust can turn brown.",
    "Rivers do not run straight, because any small bend grows. Water on the outside of the bend moves faster and "
    "carries soil away, while on the inside it slows down and drops what it carried. So the outer bank is eaten and "
    "the inner one builds up, and the bend wanders outwards year after year. In the end two bends may meet. Then "
    "the river breaks through and takes the shorter way, and the old loop is left behind as a lake in the shape of "
    "a horseshoe.",
    "When the printing press came to the city, the copyists asked the council to forbid it. They had learned their "
    "trade for seven years, they said, and a machine that any apprentice could work would ruin them. The council "
    "thought about it for a month. Finally it decided that books could be printed, but that every tenth copy had to "
    "be written by hand. The rule lasted for three winters. By then most of the copyists had become printers "
    "themselves, and the best of them drew the letters from which the type was cut.",
    "A function that calls itself needs a case in which it does not. To find the largest number in a list, look at "
    "the first one and at the largest of the rest, and keep whichever is greater; if the list has only one number, "
    "that is the answer. The computer does not know that this is clever. It puts what it was doing on a pile, "
    "starts again with a shorter list, and takes the top of the pile when it is done. If the list never got "
    "shorter, the pile would grow until there was no more room.",
    '"You are late," said my aunt without looking up from her newspaper. I explained that the train had stopped for '
    'an hour between two stations because a cow was standing on the track. "Nobody would invent such a story," she '
    'replied, "so it is probably true. Sit down. The soup is cold, but there is still some cheese, and your uncle '
    'has hidden a bottle of cider behind the encyclopedia." My uncle, who was pretending to be asleep in his chair, '
    "opened one eye.",
    "The moon pulls at the sea, and the sea follows it around the earth. On the side that faces the moon the water "
    "is drawn towards it; on the far side it is left behind a little. That makes two bulges, and since the earth "
    "turns beneath them, most coasts see high water twice a day. The sun pulls as well, though less than half as "
    "strongly. When both pull along one line, at new moon and at full moon, the tide is at its highest.",
    "Before you buy a used bicycle, lift the front wheel and spin it. It should turn freely and not rub against the "
    "brakes. Then try to move it from side to side: if it rattles, the bearing is worn. Look along the chain from "
    "behind, and ask the seller when it was last replaced. Scratches do not matter, but a crack in the frame does, "
    "and so does rust where the tubes meet. Above all, ride it around the block before you talk about the price.",
)
"""Eight short texts of different kinds, written for this project. They must not change: figures are compared."""

LIMIT = 1e9
"""Largest reported perplexity. Guessing among all tokens gives the vocabulary's size; far more means a broken model."""


@torch.inference_mode()
def perplexity(model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> float | None:
    """Return exp of the mean cross-entropy per token over TEXTS; None for an encoder-decoder model.

    An encoder-decoder predicts a target from a source, and running text has no source. The result is at most LIMIT,
    which also stands for an overflow.
    """
    if model.config.is_encoder_decoder:
        return None
    model.eval()
    device = device_of(model)
    total, num_tokens = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]], device=device)
        logits_KV = model(input_ids=ids).logits[0, :-1].float()
        total += float(cross_entropy(logits_KV, ids[0, 1:], reduction="sum"))  # the first token has no context
        num_tokens += logits_KV.shape[0]
    mean = total / num_tokens
    return math.exp(mean) if mean < math.log(LIMIT) else LIMIT  # NaN gives LIMIT too
