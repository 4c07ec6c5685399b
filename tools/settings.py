"""Writes docs/settings.md from the schema: ``python tools/settings.py``."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # a script finds what lies beside it, and the package lies beside tools/

from lora_utils.config.reference import values_of  # noqa: E402
from lora_utils.config.schema import RunConfig, all_settings, describe  # noqa: E402


def page() -> str:
    """Every setting with its default and its help, by section."""
    lines = [
        "# Settings",
        "",
        "Made from the schema by `python tools/settings.py`. Every name is a flag (`--rank 8`), a key in",
        "a YAML file, and a key of `overrides` in a notebook. Flags and overrides win over the preset or",
        "file; `none` unsets what it sets. In paths, `~` and `$VAR` are expanded, and an empty one is not",
        "given. Lists add up: `--prompt a b` is `--prompt a --prompt b`. Who names max_train_steps unsets",
        "the preset's num_train_epochs, and the other way round; where both are named at once,",
        "max_train_steps decides.",
    ]
    for section, field in RunConfig.model_fields.items():
        lines += [
            "",
            f"## {section}",
            str(field.annotation.__doc__),
            "",
            "| setting | values | default | |",
            "|---|---|---|---|",
        ]
        for leaf, (owner, setting) in all_settings().items():
            if owner == section:
                default = "" if setting.default is None else f"`{setting.default}`"
                lines.append(f"| `{leaf}` | {values_of(setting)} | {default} | {describe(setting)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "settings.md").write_text(page(), encoding="utf-8")
