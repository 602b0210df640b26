"""The table of options in docs/cli.md, from the one table of the code: python -m scripts.option_table [--check]."""

from __future__ import annotations

import sys
from pathlib import Path

from ttcompress.options import GROUPS, TABLE, Option

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
BEGIN, END = "<!-- options: python -m scripts.option_table -->\n", "<!-- /options -->\n"


def rows() -> str:
    """A table a group: how an option is written, what it means, its default, and the verbs that take it."""
    parts = []
    for group in GROUPS:
        options = [option for option in TABLE if option.group == group]
        head = [f"**{group}**", "", "| option | meaning | default | verbs |", "|---|---|---|---|"]
        parts.append("\n".join([*head, *map(row, options)]) + "\n")
    return "\n".join(parts)


def row(option: Option) -> str:
    metavar = f" {option.metavar}" if option.metavar else " " + "\\|".join(option.kind.choices)
    every = dict.fromkeys(flag for command in option.commands for flag in option.flags_of(command))
    spelled = ", ".join(f"`{flag}`" for flag in every) + (metavar if metavar.strip() else "")
    default = "" if option.kind.form == "switch" else option.default_words
    return f"| {spelled} | {option.help} | {default} | {', '.join(option.commands)} |"


def page() -> str:
    """The page with the table as it should be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{rows()}{END}{after}"


def main() -> None:
    text = page()
    if "--check" in sys.argv[1:]:
        sys.exit(0 if PAGE.read_text() == text else f"{PAGE.name} is not what the table of options says")
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
