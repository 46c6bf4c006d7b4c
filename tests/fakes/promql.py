"""What a PromQL expression names: metrics with their matchers, and the labels it groups by. Not a full parser."""

from __future__ import annotations

import re
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[A-Za-z_:][\w:]*|\d[\w.]*|=~|!~|!=|>=|<=|==|\S')
_GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}
Series = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Selector:
    """One metric name and (label, operator, value) of its braces."""

    name: str
    matchers: tuple[tuple[str, str, str], ...] = ()

    def matches(self, labels: dict[str, str]) -> bool:
        tests = {
            "=": lambda have, want: have == want,
            "!=": lambda have, want: have != want,
            "=~": lambda have, want: re.fullmatch(want, have) is not None,
            "!~": lambda have, want: re.fullmatch(want, have) is None,
        }
        return all(tests[operator](labels.get(label, ""), want) for label, operator, want in self.matchers)


@dataclass(frozen=True)
class Expression:
    selectors: tuple[Selector, ...]
    grouped_by: frozenset[str]


def read_expression(text: str) -> Expression:
    """Grafana's variables must have been filled in."""
    tokens, at = _TOKEN.findall(re.sub(r"\[[^\]]*\]", "", text)), 0
    selectors: list[Selector] = []
    grouped: set[str] = set()
    while at < len(tokens):
        token = tokens[at]
        following = tokens[at + 1] if at + 1 < len(tokens) else ""
        at += 1
        if not re.match(r"[A-Za-z_:]", token) or token.lower() in _WORDS:
            continue
        if token in _GROUPING:
            end = tokens.index(")", at)
            grouped |= {label for label in tokens[at:end] if label not in "(,"}
            at = end + 1
        elif following == "{":
            end = tokens.index("}", at)
            inside = [each for each in tokens[at + 1 : end] if each != ","]
            matchers = [(inside[i], inside[i + 1], inside[i + 2][1:-1]) for i in range(0, len(inside), 3)]
            selectors.append(Selector(token, tuple(matchers)))
            at = end + 1
        elif following != "(" and following not in _GROUPING:
            selectors.append(Selector(token))
    return Expression(tuple(selectors), frozenset(grouped))


def series_of(scrape: str) -> Series:
    """Every series of a metrics page: name -> the label sets it has."""
    found: Series = {}
    for family in text_string_to_metric_families(scrape):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(dict(sample.labels))
    return found


def problems(text: str, series: Series) -> list[str]:
    """Why the expression would show nothing on this page; empty when it would not."""
    expression, bad = read_expression(text), []
    if not expression.selectors:
        bad.append(f"{text}: names no metric")
    for selector in expression.selectors:
        sets = series.get(selector.name, [])
        if not sets:
            bad.append(f"{text}: no series {selector.name}")
            continue
        labels = set().union(*sets)
        bad += [
            f"{text}: {selector.name} has no label {name}" for name, _, _ in selector.matchers if name not in labels
        ]
        bad += [f"{text}: {selector.name} has no label {name}" for name in expression.grouped_by - labels]
        if not any(map(selector.matches, sets)):
            bad.append(f"{text}: no series of {selector.name} matches")
        for label, operator, values in selector.matchers:
            if operator in ("=", "=~") and re.fullmatch(r"[\w|]+", values):
                known = {labels.get(label) for labels in sets}
                bad += [f"{text}: {selector.name} never has {label}={v}" for v in values.split("|") if v not in known]
    return bad
