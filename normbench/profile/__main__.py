"""The door `python -m normbench.profile`: time, bytes and memory of a model's norm layers."""

from normbench.cli import run

if __name__ == "__main__":
    run("profile")
