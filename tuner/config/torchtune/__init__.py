"""What torchtune's names mean here: its keys, components, config names and commands.

torchtune (https://github.com/pytorch/torchtune, BSD-3-Clause) is known by its names only; none of its code is here.
`keys.KEYS` is the one table. The error lines of a command, the translation of a YAML and, by a test, the page
docs/coming_from_torchtune.md read it.
"""
