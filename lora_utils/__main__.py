"""``python -m lora_utils``."""

from lora_utils.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
