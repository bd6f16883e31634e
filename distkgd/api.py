"""A finished model in a program: `distkgd.load(folder)`, then `predict`, `predict_relation`, `score`, `nearest`,
`classify`, `embedding`, `search`, `crop`.

>>> import distkgd
>>> m = distkgd.load("runs/capitals/stages/student")
>>> m
TrainedModel(TransE(dim=2, margin=9.0, norm=1), 6 entities, 2 relations)
>>> m.predict(head="paris", relation="capital_of", k=2).names
[['france', 'italy']]
>>> m.predict(tail=["france", "italy"], relation="capital_of", k=1).names
[['paris'], ['rome']]
>>> m.predict(head="paris", relation="capital_of", k=1, exclude_known=True).names
[['italy']]
>>> m.score([("paris", "capital_of", "france"), ("rome", "capital_of", "france")])
tensor([9., 7.])
>>> m.nearest("paris", k=1).names, m.crop(1).nearest("paris", k=1).names
([['rome']], [['france']])
>>> m.predict_relation(head="paris", tail="france", k=1).names
[['capital_of']]
>>> false = [("paris", "capital_of", "italy"), ("rome", "capital_of", "france"), ("berlin", "capital_of", "italy")]
>>> true = [("paris", "capital_of", "france"), ("rome", "capital_of", "italy"), ("berlin", "capital_of", "germany")]
>>> m.classify([*true, *false], classifier=m.classifier(true, false)).accepted
tensor([ True,  True,  True, False, False, False])
>>> m.embedding("paris")
tensor([1., 0.])
>>> [(match.name, match.how) for match in m.search("erm")], [match.how for match in m.search("Pariss")]
([('germany', 'substring')], ['fuzzy'])

Entities and relations are given by name or label, one or many at a time: a list, a numpy array, a column of a pandas or
polars frame. A name may be written loosely ("capital of"), as at the command line. A whole number is the name, or the
label, that is written so; with `ids=True` it is the number of a row, and tensors of them will do too.

`run = distkgd.distill("triples.tsv", to=32)` and `distkgd.train(config)` train such models and return a `Run`; its
stages, tables and charts are those of the report:

>>> run = distkgd.train({"data": "data", "student": {"dim": 4, "epochs": 1, "batch_size": 2}, **quiet}, out="runs/mine")
>>> run
Run('runs/mine', stages: student)
>>> run.table()["stage", "method", "dim"].rows()
[('student', 'scratch', 4)]
>>> run.student
TrainedModel(ComplEx(dim=4), 6 entities, 2 relations)

An entity that the model does not know is placed by its triples alone, without training; `distkgd.update` trains a
finished model on a newer state of its data.

>>> new = m.with_entity("lyon", [("lyon", "in", "italy")])
>>> new.predict(head="lyon", relation="in", k=1).names, new.nearest("lyon", k=1).names
([['italy']], [['rome']])

A word that means nothing raises DataError when it is given by itself. Among many it fails its own row alone.
"""

from distkgd.evaluation.answers import Answers
from distkgd.evaluation.trained_model import TrainedModel, load
from distkgd.pipeline.autoconfig.program import distill, train
from distkgd.pipeline.autoconfig.update import update
from distkgd.pipeline.finished_run import Run

__all__ = ["Answers", "Run", "TrainedModel", "distill", "load", "train", "update"]
