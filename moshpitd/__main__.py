"""The command line: `moshpitd VERB` and `python -m moshpitd VERB`."""

from moshpitd.cli.verbs import main

if __name__ == "__main__":
    main()
