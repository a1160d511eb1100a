"""OpenAssistant's trees: people asked, several answered, and others ranked the answers.

A tree file holds one conversation tree a row, {"prompt": {"role", "text", "replies": [...]}}. The message
table holds one message a row, {"message_id", "parent_id", "role", "text"}; its rows are put together to
trees first, for which the whole table is read into memory. Rank 0 is the best; a reply that was deleted or
failed its review is left out with all that hangs on it.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from minirlhf.data.conversation import Unfit, demonstration, preference, read_messages, text
from minirlhf.data.formats.rows import Format, Unusable
from minirlhf.data.jsonl import Line, kind, malformed
from minirlhf.data.records import Demonstration, Message, Preference

_ROLES = {"prompter": "user", "assistant": "assistant"}
_DEEPEST = 200
_TABLE = ("message_id", "parent_id", "role", "text")


def parse_tree(line: Line) -> list[Demonstration]:
    """{"prompt": tree}: the path that follows the best-ranked reply everywhere; its assistant turns train."""
    node = _root(line)
    path = [_said(line, node)]
    while replies := _replies(line, node):
        node = replies[0]
        path.append(_said(line, node))
    return [demonstration(path, line.number)]


def parse_tree_preferences(line: Line) -> list[Preference | Unusable]:
    """{"prompt": tree}: every two ranked answers to one message, after all that was said before them."""
    records: list[Preference | Unusable] = []
    _compare(line, _root(line), (), records)
    return records or [Unusable("no two ranked answers")]


def gather_trees(lines: Iterator[Line]) -> Iterator[Line]:
    """Rows of the message table -> one row per tree, which stands where its first message stood.

    Raises:
        InputError: a message that stands twice, or answers one that is nowhere in the table.
    """
    nodes: dict[str, dict[str, Any]] = {}
    places: dict[str, Line] = {}
    for line in lines:
        name = line.values.get("message_id")
        if not isinstance(name, str):
            expected = '"message_id" to be a string'
            malformed(line.place, expected=expected, found=kind(name))
        if name in nodes:
            expected = f'"message_id" other than in {places[name].unit} {places[name].number}'
            malformed(line.place, expected=expected, found="the same")
        nodes[name], places[name] = {**line.values, "replies": []}, line
    for name, node in nodes.items():
        parent = node.get("parent_id")
        if parent is None:
            continue
        if not isinstance(parent, str) or parent not in nodes:
            expected = '"parent_id" to be null or the "message_id" of a row'
            malformed(places[name].place, expected=expected, found="another")
        nodes[parent]["replies"].append(node)
        _check_depth(nodes, places[name])
    roots = [name for name, node in nodes.items() if node.get("parent_id") is None]
    for name in roots:
        yield places[name]._replace(values={"prompt": nodes[name]})


def _check_depth(nodes: dict[str, dict[str, Any]], line: Line) -> None:
    """That a message hangs on a first one, and not on itself."""
    above = line.values["parent_id"]
    for _ in range(_DEEPEST):
        if above not in nodes:  # null above a first message; a wrong name has its own complaint
            return
        above = nodes[above].get("parent_id")
    expected = f"a chain of at most {_DEEPEST} replies up to a first message"
    malformed(line.place, expected=expected, found="a longer one, or a circle")


def _compare(
    line: Line, node: dict[str, Any], before: tuple[Message, ...], records: list[Preference | Unusable]
) -> None:
    said = (*before, _said(line, node))
    replies = _replies(line, node)
    ranked = [reply for reply in replies if reply.get("rank") is not None and reply["role"] == "assistant"]
    for better, worse in itertools.combinations(ranked, 2):
        if better["rank"] < worse["rank"]:
            try:
                chosen, rejected = ((_said(line, reply),) for reply in (better, worse))
                records.append(preference(said, chosen, rejected, line.number))
            except Unfit as unfit:
                records.append(Unusable(str(unfit)))
    for reply in replies:
        _compare(line, reply, said, records)


def _root(line: Line) -> dict[str, Any]:
    root = line.values["prompt"]
    if root is None:
        raise Unfit('null "prompt"')
    if not isinstance(root, dict):
        malformed(line.place, expected='"prompt" to be a tree', found=kind(root))
    if root.get("deleted"):
        raise Unfit("the first message was deleted")
    return root


def _said(line: Line, node: dict[str, Any]) -> Message:
    speaker = text(line, node, "role", where=" of a message of the tree")
    if speaker not in _ROLES:
        expected = f'"role" of a message of the tree in {list(_ROLES)}'
        malformed(line.place, expected=expected, found="another role")
    content = text(line, node, "text", where=" of a message of the tree")
    (message,) = read_messages(line, [{"role": _ROLES[speaker], "content": content}], "replies")
    return message


def _replies(line: Line, node: dict[str, Any]) -> list[dict[str, Any]]:
    """The replies that stand, the best first; unranked ones follow in their order."""
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        malformed(line.place, expected='"replies" to be a list of objects', found="others")
    for reply in replies:
        rank = reply.get("rank")
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int | float)):
            malformed(line.place, expected='"rank" to be a number or null', found=kind(rank))
    standing = [r for r in replies if not r.get("deleted") and r.get("review_result") is not False]
    return sorted(standing, key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0))


def _holds_tree(values: dict[str, Any]) -> bool:
    return isinstance(values["prompt"], dict)


_BEST = "along the best-ranked replies, assistant turns train"
_PAIRS = "every two ranked answers to one message are a pair"
_GATHERED = "messages are put together to trees, for which the whole table is held in memory; "

TREE = Format(
    key="trees",
    name="OpenAssistant trees",
    columns=("prompt",),
    optional=(),
    meaning=_BEST,
    parse=parse_tree,
    fits=_holds_tree,
)
TREE_PREFERENCE = TREE._replace(meaning=_PAIRS, parse=parse_tree_preferences)
MESSAGE_TABLE = Format(
    key="message-table",
    name="OpenAssistant messages",
    columns=_TABLE,
    optional=("rank", "deleted", "review_result"),
    meaning=_GATHERED + _BEST,
    parse=parse_tree,
    gather=gather_trees,
)
MESSAGE_TABLE_PREFERENCE = MESSAGE_TABLE._replace(meaning=_GATHERED + _PAIRS, parse=parse_tree_preferences)
