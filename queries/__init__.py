"""A concept -> evidence: gradients of the question, search, statistics, reports.

concept.py    what is asked, and how
company.py    captions of the corpus that a concept is said beside
gradients.py  pictures, trajectories and query rows, seed by seed
ask.py        an index that can be asked
result.py     the answer: hits, roll-up, JSON
report.py     the answer as one HTML page
"""

from .ask import Index
from .company import company_of, drawn_captions
from .concept import QUALITY, Asking, Concept, label_free
from .errors import QueryError
from .report import Section, write_report
from .result import Hit, Result, write_json

__all__ = [
    "QUALITY",
    "Asking",
    "Concept",
    "Hit",
    "Index",
    "QueryError",
    "Result",
    "Section",
    "company_of",
    "drawn_captions",
    "label_free",
    "write_json",
    "write_report",
]
