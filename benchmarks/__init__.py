"""Measurements that can be replayed; `headwater bench NAME` runs those that ship.

Methods against questions with known answers:
study.py           questions put to a method, also in further pairs (further.py)
methods.py         every method, as a setting of the engine
measure.py         rankings measured, baselines; summary.py means and choices of lambda
runs.py            a run's settings, what it is made with, what it has so far (parts.py)
record.py          what a run leaves behind
emoji.py           object and style of real art that was held out
caption_variants.py  its captions changed: influence or caption matching?
text_share.py      how much of a score enters through the text
beyond.py          ideas beyond the default, each with its gain; pieces.py what they are made of
synthetic.py, faces.py  drawn worlds with a combination that is never shown, from end to end in
                   world_study.py: worlds.py, world_models.py, recognition.py, small_models.py
                   and small_training.py are its parts
abc.py, abc_tree.py  the published exemplars; abc_mini.py, subjects.py, finetuning.py our own
lds.py, counterfactual.py  retraining foreseen, and retraining without what is ranked first:
                   material.py, retraining.py, stacked.py, noised.py, presence.py are their parts

Speed and size:
speed.py           the engine against the published loop, on models of real size
published_loop.py  that loop, written plainly; sizes.py random pipelines of real size
query_speed.py     one question; index_bench.py search; sql_bench.py SQL over the items

The other files are scripts that were run once or need data of their own: each says how.
"""
