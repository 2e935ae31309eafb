"""argparse as the commands of this package want it."""

import argparse


class Parser(argparse.ArgumentParser):
    """One line per error, without the usage, under the name of the module: `prog` is "python -m NAME"."""

    def error(self, message):
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: error: {' '.join(message.split())}\n")
