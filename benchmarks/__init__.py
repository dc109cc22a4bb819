"""Measurements that can be replayed; `headwater bench NAME` runs those that ship.

speed.py           the engine against the published loop, on models of real size
published_loop.py  that loop, written plainly
sizes.py           random pipelines of real size
methods.py         every method that benchmarks compare, as a setting of the engine
sql_bench.py       SQL over the items of a large index
synthetic.py       triangles and circles, red and blue: which images taught the unseen red triangle
faces.py           drawn faces with glasses, hat and smile: which taught the unseen triple
world_study.py     what these two share from end to end, with world_models.py, worlds.py,
                   recognition.py, small_training.py and small_models.py below it

The other files are scripts that were run once or need data of their own: each says how.
"""
