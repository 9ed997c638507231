"""Words of messages."""


def counted(n: int, noun: str, plural: str = "") -> str:
    """A number and its noun: "1 step", "5,000 steps". A plural other than the noun with an s is given."""
    return f"{n:,} {noun if n == 1 else plural or f'{noun}s'}"
