"""How runs and versions end, in words. Each word is stored, printed, sent and shown in this one spelling."""

from __future__ import annotations

from typing import Literal

Outcome = Literal[
    "promoted",
    "awaiting approval",
    "rollout",
    "remade",
    "rejected",
    "repeat",
    "skipped",
    "held",
    "refused",
    "failed",
    "deleted",
]
"""How the run of an arrival ended.

promoted: its version is champion. awaiting approval: the gate accepted the version, and a person decides. rollout: the
version is tried on live traffic first. remade: a branch made the version, and no swap has made it champion. rejected:
the gate, a rollout or a person rejected the version. repeat: an earlier version has learned the rows. skipped: the
champion answers the rows well enough. held: the labels disagree with the champion, or the run was cancelled, and a
person lets the arrival go on. refused: its rows cannot be used. failed: an error ended the run. deleted: its rows were
deleted afterwards.
"""

Standing = Literal[
    "learned",
    "awaiting approval",
    "rollout",
    "remade",
    "left behind",
    "rejected by the gate",
    "rejected by a person",
    "rejected by its rollout",
]
"""What a version is now. The words that `Outcome` has too mean the same.

learned: it is the champion, or an ancestor of it. awaiting approval: its parent is champion, and a person decides.
left behind: it was accepted and is no ancestor of the champion, because the lineage was rolled back or moved past it.
"""

Action = Literal["promoted", "rollout", "rejected", "rolled back", "stopped"]
"""A move in the promotion log.

rollout: the version is tried on live traffic; its promotion or rejection ends that. rolled back: an earlier version is
champion again. stopped: no version is champion any more, until versions were made again.
"""
