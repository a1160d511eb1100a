"""What a kind of subject is: its canonical signature, the inputs it is tried on, its oracle, and its laws.

A *kind* describes all right implementations of one piece of mathematics ("dpo", "gae", ...). Its canonical
signature is that of our own function in `objectives`, its oracle the formula of the paper in fp64, written
the plain way (naive, unmasked row by row, never from `objectives`), its laws what is true of every right
implementation. What may legitimately differ (sign, aggregation, a factor, an estimator) is a `Convention`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

Case = dict[str, Any]
"""One input: canonical argument name → fp64 tensor, bool mask, int tensor or number. A feature that is not
used is not in it."""

Options = Mapping[str, Any]
"""The value of each convention of the kind that belongs to the formula (see `Convention`)."""

Ask = Callable[[Case], float]
"""What a subject answers to a case of one element."""


class Reals(NamedTuple):
    """Tensor elements between low and high, or now and then one of the specials (kinks, ties, zeros)."""

    low: float = -4.0
    high: float = 4.0
    special: tuple[float, ...] = ()


class Numbers(NamedTuple):
    """A hyperparameter, one of these; usual: values to try where a subject has it built in."""

    choices: tuple[float, ...]
    usual: tuple[float, ...] = ()


class Mask(NamedTuple):
    """A bool tensor, in each row one window of True: prompt, response, padding. No row is empty."""


class Flags(NamedTuple):
    """A bool tensor without structure."""


class Counts(NamedTuple):
    """Integers from low to high, both included, as an int64 tensor."""

    low: int
    high: int


Domain = Reals | Numbers | Mask | Flags | Counts


class Argument(NamedTuple):
    """One argument of a canonical signature.

    shape: letters, one per axis; () is a number or a tensor [].
    optional: a feature that a subject may lack (keyword only, absent from cases that do not use it).
    neutral: for a required argument that a subject may lack (a mask): its value for such a subject.
    synonyms: what other libraries call it; a subject's parameter of such a name is matched by itself.
    """

    name: str
    shape: tuple[str, ...]
    domain: Domain
    meaning: str
    optional: bool = False
    neutral: Callable[[Case], Any] | None = None
    synonyms: tuple[str, ...] = ()

    @property
    def type_name(self) -> str:
        """As the documentation prints it: "[B, T] bool", "number"."""
        if isinstance(self.domain, Numbers):
            return "number"
        dtype = {Mask: " bool", Flags: " bool", Counts: " int"}.get(type(self.domain), "")
        return f"[{', '.join(self.shape)}]{dtype}"


class Convention(NamedTuple):
    """A choice that right implementations make differently: the first value is ours.

    values: value → how it is reported. The value reaches the oracle as options[name].
    """

    name: str
    values: Mapping[Any, str]


class Dialect(NamedTuple):
    """Another way in which right subjects take one argument: one advantage per sequence, labels of -100.

    say: (case) -> what the subject is given for the argument. project: (case) -> the nearest case that can be
    said so. carries: arguments that are said with it, which such a subject does not lack.
    """

    argument: str
    note: str
    say: Callable[[Case], Any]
    project: Callable[[Case], Case] = lambda case: case
    carries: tuple[str, ...] = ()


class Layout(NamedTuple):
    """Another shape in which right subjects return the same numbers.

    fits: (result, case) -> whether it is that. canonical: the same in the shape of the kind; code: as source.
    """

    note: str
    fits: Callable[[Tensor, Case], bool]
    canonical: Callable[[Tensor], Tensor]
    code: str


class Claim(NamedTuple):
    """One comparison that a law makes: on `case`, the subject's value (or gradient) must stand in `relation`
    to `want`.

    got: what the subject gave, in canonical orientation; an exception where it raised.
    relation: "==", ">=", "<=", "finite" (want is ignored) or "holds" (got is a bool tensor).
    wrt: the argument whose gradient is meant; None for the value.
    why: where `want` comes from, one line; it is printed beside the counter-example.
    take: an index expression into the result that `got` is, such as "[:, :3]"; code that a reader runs.
    field: which field of the result; None for the main one.
    loose: how many times 1e-8, relative, the two may differ (more where the subject is in single precision).
    raw: what lies under the mask is part of `got`.
    """

    case: Case
    got: Tensor | BaseException
    relation: str
    want: Tensor | None
    why: str
    wrt: str | None = None
    take: str = ""
    field: str | None = None
    loose: float = 1.0
    raw: bool = False


class Probed(Protocol):
    """What a law sees of a subject: its results with sign and factor removed, in its own reduction."""

    @property
    def options(self) -> Options: ...
    @property
    def per_element(self) -> bool: ...
    @property
    def by_row(self) -> bool: ...
    @property
    def ascending_loss(self) -> bool: ...
    def has(self, feature: str) -> bool: ...
    def named(self, argument: str) -> str: ...
    def value(self, case: Case, field: str | None = None) -> Tensor: ...
    def raw(self, case: Case) -> Tensor: ...
    def written_to(self, case: Case) -> list[str]: ...
    def grad(self, case: Case, wrt: str, weight: Tensor | None = None) -> Tensor: ...
    def expected(self, case: Case) -> Tensor: ...
    def expected_grad(self, case: Case, wrt: str) -> Tensor: ...
    def reduced(self, per_element: Tensor, case: Case) -> Tensor: ...
    def able(self, case: Case) -> bool: ...


Check = Callable[[Probed, Case], Iterator[Claim]]


class Law(NamedTuple):
    """What is true of every right implementation.

    family: "value", "gradient", "limit", "symmetry", "invariance", "mask", "batch", "numeric", "identity"...
    statement: the law in one line; source: where it comes from.
    check: yields its claims about one case.
    needs: optional arguments and behaviours (`Kind.behaviours`) without which it does not apply.
    proves: the behaviour that breaking this law disproves: then the subject lacks a feature, and is not
        defective unless that feature was required.
    cases: deterministic probes in place of the kind's pool; None takes the pool.
    """

    name: str
    family: str
    statement: str
    source: str
    check: Check
    needs: tuple[str, ...] = ()
    proves: str | None = None
    cases: Callable[[], list[Case]] | None = None


class Kind(NamedTuple):
    """All that `certify` knows of one kind of subject.

    returns: the canonical result, for the documentation; shape: its letters.
    differentiable: the arguments that a loss differentiates; () for what is used as a constant.
    oracle: (case, options) -> the result per element in fp64, with gradients for `differentiable`.
    arrange: makes a drawn case consistent (lengths, probabilities, ratios near the clip).
    reducible: a subject may return a sum or mean instead of the elements.
    signed: minus the canonical result is a convention (an objective to maximise).
    factors: factors of the result that are conventions, factor → how it is reported.
    mask: the argument that masks; rows: the arguments (and result) have the batch as first axis.
    fields: names of further results, if the canonical result is a tuple; the first is the main one.
    sizes: axis letter → (smallest, largest) in drawn cases.
    measure: number → how to read it off a subject that has it built in, from a few answers; None: it cannot.
    dialects, layouts: other ways to take an argument and to return the result.
    last_axis: what a subject calls the length of the last axis; one that asks for it gets tensors flattened.
    anchor: a change of a case after which most wrong subjects are right (ratio 1, the whole batch at once):
        by it the sign and reduction of a wrong one are told.
    fit_by: the argument whose gradient tells the variants apart, where values do not count; None: values do.
    """

    name: str
    title: str
    arguments: tuple[Argument, ...]
    returns: str
    shape: tuple[str, ...]
    oracle: Callable[[Case, Options], Tensor]
    laws: tuple[Law, ...]
    differentiable: tuple[str, ...] = ()
    arrange: Callable[[Case], Case] = lambda case: case
    conventions: tuple[Convention, ...] = ()
    reducible: bool = False
    signed: bool = False
    factors: Mapping[float, str] = {1.0: ""}
    mask: str | None = None
    fields: tuple[str, ...] = ()
    sizes: Mapping[str, tuple[int, int]] = {}
    extra_cases: Callable[[], list[Case]] = lambda: []
    measure: Mapping[str, Callable[[Ask], float | None]] = {}
    dialects: tuple[Dialect, ...] = ()
    layouts: tuple[Layout, ...] = ()
    last_axis: tuple[str, ...] = ()
    anchor: Callable[[Case], Case] | None = None
    fit_by: str | None = None

    def argument(self, name: str) -> Argument:
        """The argument of that name."""
        return next(argument for argument in self.arguments if argument.name == name)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the real tensors."""
        return tuple(a.name for a in self.arguments if isinstance(a.domain, Reals))

    @property
    def behaviours(self) -> tuple[str, ...]:
        """What a subject may do beyond its arguments, each disproved by some law."""
        return tuple(dict.fromkeys(law.proves for law in self.laws if law.proves))

    @property
    def features(self) -> tuple[str, ...]:
        """Everything that a subject may lack without being wrong."""
        optional = [
            a.name
            for a in self.arguments
            if a.optional or a.neutral is not None or isinstance(a.domain, Numbers)
        ]
        return (*optional, *self.fields[1:], *self.behaviours)

    @property
    def signature(self) -> str:
        """The canonical signature as one line of Python."""
        first = [f"{a.name} {a.type_name}" for a in self.arguments if not isinstance(a.domain, Numbers)]
        last = [
            a.name + ("=None" if a.optional else "") for a in self.arguments if isinstance(a.domain, Numbers)
        ]
        return f"({', '.join([*first, *(['*'] if last else []), *last])}) -> {self.returns}"
