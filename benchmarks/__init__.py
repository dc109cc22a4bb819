"""Measurements that can be replayed; `headwater bench NAME` runs those that ship.

speed.py           the engine against the published loop, on models of real size
published_loop.py  that loop, written plainly
sizes.py           random pipelines of real size
methods.py         every method that benchmarks compare, as a setting of the engine
sql_bench.py       SQL over the items of a large index

The other files are scripts that were run once or need data of their own: each says how.
"""
