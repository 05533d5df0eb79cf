"""Merges for the packaged tokenizers, written down and not trained, so that these never change.

The commonest pairs of English letters, in the order in which byte-pair encoding applies them. The later ones were found
in the docstrings of Python's standard library, which the packaged tokenizers are mostly used on.
"""

from __future__ import annotations

NUM_FIRST = 84
"""How many of them the tokenizer of `model=tiny` has."""

# Ġ stands for a space before the letters.
_MERGES = """
Ġ t|Ġ a|h e|i n|r e|o n|Ġt he|e r|Ġ s|a t|Ġ c|n d|Ġ o|e s|Ġ w|o r|Ġ f|i s|e n|i t|Ġ b|o u|Ġ p|in g|e d|a n|Ġo f|Ġ m|
a l|Ġt o|Ġ in|a r|Ġa nd|o m|i on|Ġ d|l e|i c|a s|Ġ h|l l|en t|Ġ n|Ġ e|s e|Ġ l|Ġ g|Ġ re|r o|v e|Ġ is|t er|u r|c t|
Ġ u|at ion|Ġf or|u n|s t|Ġb e|i l|e t|c e|Ġs t|o t|Ġt h|Ġth at|m ent|u t|Ġ on|Ġ T|ĠT he|a c|u l|it h|Ġw ith|s s|c h|i f|
m e|t h|o l|a d|r a|
o d|ur n|e c|i m|p t|i d|Ġa n|al l|e ct|x t|u e|a me|Ġo r|Ġ v|Ġ it|as s|a nd|is t|R et|Ġc on|Ret urn|i le|Ġb y|o c|
a b|Ġ if|e f|Ġ I|a g|Ġa s|a m|i g|t e|p le|at e|ul t|b j|t urn|v er|l y|Ġe x|o w|es s|t he|r ing|l ass|pt ion|bj ect|
ct ion|Ġu s|Ġc om|Ġre turn|p p|q u|r i|Ġs e|Ġa re|r om|u m|k e|Ġa r|Ġo bject|n t|es t|Ġf ile|in e|u ment|Ġv al|p e|
Ġn ot|i ll|Ġf rom|Ġs u|od e|Ġst ring|Ġc all|a y|or t|p ec|Ġth is|i r|et h|e m|g ument|p l|i v|eth od|un ction|Ġp ro|
Ġc an|im al|ab le|Ġd ef|Ġ A|ec imal|Ġw ill|Ġw h|a ult|T he|l o|ag e|Ġc lass|ac k|Ġl ist|er s|g et|Ġn e|l d|D ecimal|
h is|a in|on e|r or|Ġ C|Ġm ethod|Ġ N|Ġa ll|Ġc h|Ġar gument|Ġf unction|Ġw he|o p|i z|Ġa t|re s|in d|Ġ S|d d|pec if|
or m|at ed|re d|ic h|Ġ P|the r|re nt|Ġs et|r ue|oc k|st an|Ġm od|Ġ he|at h|or d|i ve|y pe|Ġ im|Ġval ue|in t|b er|as e|
te xt|Ġus ed|u le|en c|i ed|Ġ r|Ġs h|ke y|u st|Ġwh ich|ĠI f|ar y|Ġn ame|Ġ E|at a|Ġre s|e xt|C on
"""


def merges(number: int) -> list[tuple[str, str]]:
    """The first `number` of them, as pairs; `Ġ` is a space."""
    pairs = [pair.split(" ") for pair in _MERGES.replace("\n", "").split("|")]
    return [(left, right) for left, right in pairs[:number]]
