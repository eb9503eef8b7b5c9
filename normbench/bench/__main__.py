"""The door `python -m normbench.bench`: measure what the project's speed claims say."""

from normbench.cli import run

if __name__ == "__main__":
    run("bench")
