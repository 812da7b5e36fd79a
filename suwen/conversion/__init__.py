"""Checkpoints whose architecture needs code from their folder, converted once to classes that need none.

`families` says what becomes what, `weights` does it shard by shard, `tokenizers` converts and checks the tokenizer,
`originals` holds the original forward passes that a conversion is checked against.
"""
