"""Write the manual pages, docs/man: `make man`.

The pages are made from the parser that `--help` prints and from config/agent.toml, which shows
every key. Both are tested. The pages are committed, so that no package needs Python tools to be
built; a test fails when they are out of date. docs/decisions/0021 says why this is not left to
argparse-manpage.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from roff import body, escaped, prose, title, verbatim

from caam_hotplug import names
from caam_hotplug.cli import main as cli

REPOSITORY: Final = Path(__file__).resolve().parents[1]


def main() -> None:
    """Write every page into the repository."""
    for name, text in generated().items():
        (REPOSITORY / name).write_text(text)


def generated() -> dict[str, str]:
    """Make the text of every page, by its path in the repository."""
    parser = cli._parser()
    settings = (REPOSITORY / "config" / "agent.toml").read_text()
    return {
        "docs/man/caam-hotplug.1": page_of_parser(parser),
        "docs/man/caam-hotplug.toml.5": page_of_settings(settings),
    }


# -- the program's page --------------------------------------------------------------------------

_FILES: Final = {
    f"{names.CONFIG_FILE}": "The configuration, see `caam-hotplug.toml`(5).",
    f"{names.CONFIG_FILE.parent / names.RULES_DIRECTORY}/*.toml": "Further rules.",
    f"{names.BLOB_DIRECTORY}/LABEL.bb": "Black blobs.",
    f"{names.MOUNT_ROOT}/LABEL": "Where media are mounted.",
}


def page_of_parser(parser: argparse.ArgumentParser) -> str:
    """Make the manual page of a program from its parser and all that are nested in it."""
    description = parser.description or ""
    name = f"{description[:1].lower()}{description[1:]}".rstrip(".")
    page = title(parser.prog, 1)
    page += f".SH NAME\n{escaped(parser.prog)} \\-\n{prose(name)}.SH SYNOPSIS\n"
    every = list(commands(parser, parser.prog, ""))
    for words, one, _ in every:
        if _nested(one) is None:
            page += f".SY {escaped(parser.prog)}\n{_usage(one, words)}.YS\n"
    page += f".SH DESCRIPTION\n{body(description)}.SH OPTIONS\n{_arguments(parser)}"
    page += ".SH COMMANDS\n"
    printed: dict[tuple[str, str], str] = {}
    for words, one, summary in every[1:]:
        page += f'.SS "{escaped(words)}"\n' + body(one.description or f"{_sentence(summary)}")
        page += _arguments(one, but=(argparse._HelpAction,))
        for heading, content in sections(one.epilog or ""):
            page += f".PP\n{prose(heading.capitalize() + ':')}" if heading else ".PP\n"
            same = printed.setdefault((heading, content.strip()), words)
            page += prose(f"As for `{same}`.") if same != words else _section_body(heading, content)
    for heading, content in sections(parser.epilog or ""):
        page += f'.SH "{escaped(heading.upper() or "NOTES")}"\n' + _section_body(heading, content)
    page += ".SH FILES\n"
    for file, what in _FILES.items():
        page += f".TP\n\\fI{escaped(file)}\\fR\n{prose(what)}"
    return (
        page + ".SH SEE ALSO\n.BR caam\\-hotplug.toml (5),\n.BR journalctl (1),\n.BR udevadm (8)\n"
    )


def _sentence(words: str) -> str:
    """Begin the words with a capital letter and end them with a full stop."""
    return f"{words[:1].upper()}{words[1:]}{'' if words.endswith('.') else '.'}" if words else ""


def _nested(
    parser: argparse.ArgumentParser,
) -> argparse._SubParsersAction[argparse.ArgumentParser] | None:
    """Find the commands of the parser, if it has any."""
    return next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)


def commands(
    parser: argparse.ArgumentParser, words: str, summary: str
) -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    """Yield the parser and all that are nested in it: its words, the parser, its help."""
    yield words.removeprefix(f"{names.PROGRAM} "), parser, summary
    nested = _nested(parser)
    if nested is None:
        return
    for choice in nested._choices_actions:
        if choice.help != argparse.SUPPRESS:
            name = choice.dest
            yield from commands(nested.choices[name], f"{words} {name}", choice.help or "")


def _usage(parser: argparse.ArgumentParser, words: str) -> str:
    """Print the words of the command and its arguments, as the body of a synopsis."""
    parts = [f"\\fB{escaped(words)}\\fR"]
    listed = [a for a in shown(parser) if not isinstance(a, argparse._HelpAction)]
    groups = [
        (group.required, [a for a in group._group_actions if a in listed])
        for group in parser._mutually_exclusive_groups
    ]
    for action in listed:
        required, members = next(
            (group for group in groups if action in group[1]), (action.required, [action])
        )
        if action is members[0]:
            either = " | ".join(_spelled(parser, member, short=True) for member in members)
            if len(members) > 1 and required:
                parts.append(f"({either})")
            else:
                parts.append(either if required or not action.option_strings else f"[{either}]")
    return "".join(f"{part}\n" for part in parts)


def shown(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """List the arguments and options that help shows."""
    return [
        action
        for action in parser._actions
        if action.help != argparse.SUPPRESS and not isinstance(action, argparse._SubParsersAction)
    ]


def _spelled(parser: argparse.ArgumentParser, action: argparse.Action, *, short: bool) -> str:
    """Print the option or argument with the value that it takes."""
    formatter = parser._get_formatter()
    takes = ""
    if action.nargs != 0:
        default = action.dest.upper() if action.option_strings else action.dest
        takes = f"\\fI{escaped(formatter._format_args(action, default))}\\fR"
    strings = action.option_strings[-1:] if short else action.option_strings
    options = ", ".join(f"\\fB{escaped(option)}\\fR" for option in strings)
    return " ".join(filter(None, (options, takes)))


def _arguments(parser: argparse.ArgumentParser, *, but: tuple[type, ...] = ()) -> str:
    """Print every argument and option with its help."""
    text = ""
    for action in shown(parser):
        if isinstance(action, but):
            continue
        words = parser._get_formatter()._expand_help(action) if action.help else ""
        choices = [str(choice) for choice in action.choices or ()]
        if choices and action.metavar is not None and not all(c in words for c in choices):
            words = f"{words}{': ' if words else ''}{', '.join(choices)}"
        text += f".TP\n{_spelled(parser, action, short=False)}\n{prose(_sentence(words))}"
    return text


def sections(epilog: str) -> list[tuple[str, str]]:
    """Split an epilog at its headings: lines such as `examples:` or `exit status: 0 done`."""
    found: list[tuple[str, str]] = []
    for line in epilog.splitlines():
        heading = re.match(r"([a-zA-Z][a-zA-Z ]{2,30}):(?: +(.*))?$", line)
        if heading:
            found.append((heading[1], heading[2] or ""))
        elif found:
            found[-1] = (found[-1][0], f"{found[-1][1]}\n{line}")
        elif line.strip():
            found.append(("", line))
    return found


def _section_body(heading: str, content: str) -> str:
    """Print a list of exit statuses if the section is one, else paragraphs."""
    parts = re.split(r"[;\n]\s*(?=\d+ )", content.strip())
    if heading.lower().startswith("exit") and all(re.match(r"\d+ ", part) for part in parts):
        listed = (part.split(None, 1) for part in parts)
        return "".join(f".TP\n.B {number}\n{prose(_sentence(what))}" for number, what in listed)
    return body(content)


# -- the configuration's page --------------------------------------------------------------------

_SCHEMA: Final = re.compile(r"\A#:schema .*\n")
_EXAMPLE: Final = "\n# [[rule]]\n"
_KINDS: Final = (
    ("gap", re.compile(r"")),
    ("header", re.compile(r"(?:# )?(\[+[a-z_.]+\]+)")),
    ("key", re.compile(r"(?:# )?([a-z_0-9]+ = .+)")),
    ("words", re.compile(r"# ?(.*)")),
)
"""Kinds of lines in the installed file, each with what it says."""


def page_of_settings(text: str) -> str:
    """Make the manual page of the configuration from the words of the installed file."""
    keys, _, example = _SCHEMA.sub("", text).partition(_EXAMPLE)
    page = title("caam-hotplug.toml", 5)
    page += ".SH NAME\ncaam\\-hotplug.toml \\- which media are unlocked and mounted, and how\n"
    page += f".SH SYNOPSIS\n.I {escaped(str(names.CONFIG_FILE))}\n.br\n"
    page += f".I {escaped(str(names.CONFIG_FILE.parent / names.RULES_DIRECTORY))}/*.toml\n"
    page += ".SH DESCRIPTION\nThis page is the text of the installed file.\n.PP\n"
    sections, about_example = _settings(keys)
    page += sections
    if example:
        lines = [line.removeprefix("#").removeprefix(" ") for line in example.splitlines()]
        page += ".SH EXAMPLE\n" + about_example + verbatim("\n".join(["[[rule]]", *lines]))
    return page + ".SH SEE ALSO\n.BR caam\\-hotplug (1)\n"


def _settings(keys: str) -> tuple[str, str]:
    """Make the sections of the keys, and of the words after the last of them."""
    page = ""
    words: list[str] = []
    touches = has_keys = False
    for kind, lines in _line_runs(keys):
        if kind == "words":
            words.append("\n".join(lines))
        elif kind == "header":
            page += f'.SH "{escaped(lines[0])}"\n' + _paragraphs(words)
            words, has_keys = [], True
        elif kind == "key":
            about = body(words.pop()) if touches else ""
            if not has_keys:
                page += _paragraphs(words) + '.SH "KEYS OF THE FILE"\n'
            elif words:
                page += ".PP\n" + _paragraphs(words)
            page += ".TP\n" + ".TQ\n".join(map(_key, lines)) + about
            words, has_keys = [], True
        touches = kind == "words"
    return page, _paragraphs(words)


def _line_runs(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the kind and the content of neighbouring lines that are of one kind."""
    found = [
        next((kind, match) for kind, form in _KINDS if (match := form.fullmatch(line)))
        for line in text.splitlines()
    ]
    for kind, run in itertools.groupby(found, key=lambda pair: pair[0]):
        yield kind, [match[match.lastindex or 0] for _, match in run]


def _key(line: str) -> str:
    """Print a key in bold, with its value."""
    key, _, value = line.partition(" = ")
    return f"\\fB{escaped(key)}\\fR = {escaped(value)}\n"


def _paragraphs(texts: list[str]) -> str:
    """Print texts as paragraphs."""
    return ".PP\n".join(body(text) for text in texts if text.strip())


if __name__ == "__main__":
    main()
