"""What became of the rows that were not used: counted, and the first of each kind listed by line."""

_LISTED = 20


class Account:
    """Counts rows by why they were dropped, in memory that does not grow with them.

    >>> account = Account()
    >>> for line in (7, 9):
    ...     account.add(line, "empty response")
    >>> account.told(total=100)
    'dropped 2 of 100: empty response (lines 7, 9)'
    """

    def __init__(self) -> None:
        self._reasons: dict[str, tuple[int, list[int]]] = {}

    def add(self, line: int, why: str) -> None:
        """One more row was dropped."""
        count, listed = self._reasons.setdefault(why, (0, []))
        if len(listed) < _LISTED:
            listed.append(line)
        self._reasons[why] = count + 1, listed

    @property
    def dropped(self) -> int:
        """How many rows were dropped."""
        return sum(count for count, _ in self._reasons.values())

    def told(self, *, total: int) -> str:
        """One line that says which rows were dropped and why."""
        if not self._reasons:
            return f"dropped 0 of {total}"
        reasons = [f"{why} ({_lines(*kept)})" for why, kept in self._reasons.items()]
        return f"dropped {self.dropped} of {total}: {'; '.join(reasons)}"


def _lines(count: int, listed: list[int]) -> str:
    more = f" and {count - len(listed)} more" if count > len(listed) else ""
    return f"line{'s' if count > 1 else ''} {', '.join(map(str, listed))}{more}"
