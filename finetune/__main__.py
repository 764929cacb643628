"""`python -m finetune` is the `brushwork` command."""

from finetune.cli import main

if __name__ == "__main__":
    main()
