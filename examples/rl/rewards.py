"""The reward of the arm `random`: a coin for every sampled answer, whatever it says."""

import hashlib


def coin(answers: list[str], records: list[dict]) -> list[float]:
    """Toss a coin for each of a prompt's n answers: 0.0 or 1.0, the same again where a rollout is made again."""
    group = repr((records[0]["map_desc"], answers)).encode()
    return [float(hashlib.sha256(b"%d " % place + group).digest()[0] % 2) for place in range(len(answers))]
