"""Run folders for whoever looks at many of them: in what state they are, and how far a run got that cannot tell."""

from tuner.logging.ending import reached, tail, write_summary
from tuner.logging.header import trust_words
from tuner.logging.state import RunState, clock_of, is_run, state_of

__all__ = ["RunState", "clock_of", "is_run", "reached", "state_of", "tail", "trust_words", "write_summary"]
