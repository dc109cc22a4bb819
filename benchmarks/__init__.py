"""Measurements that can be replayed; `headwater bench NAME` runs those that ship.

speed.py           the engine against the published loop, on models of real size
published_loop.py  that loop, written plainly
sizes.py           random pipelines of real size
methods.py         every method that benchmarks compare, as a setting of the engine
emoji.py           the benchmark on real art: object and style of pairs that were held out
caption_variants.py  its captions changed: influence or caption matching?
text_share.py      how much of a score enters through the text
beyond.py          ideas beyond the default, each with its gain; pieces.py what they are made of
sql_bench.py       SQL over the items of a large index

The other files are scripts that were run once or need data of their own: each says how.
"""
