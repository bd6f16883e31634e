"""Published models to stand beside a run's own, by data set: only those whose MRR is measured as ours is.

That is: filtered, against all entities, in both directions, on all test triples, no candidate masked but known answers.
(The authors' programs rank an answer behind its equals; real-valued scores of trained models hardly have any.) Figures
of PyKEEN's 2,924 test triples of WN18RR (SpeedE, EARL), and of rankings without the query's own head (MuRP, HyboNet,
LorentzKG), are not among them.
"""

from dataclasses import dataclass

from distkgd.reporting.run_report import RunReport

CHAMI = "Chami et al., ACL 2020"
DURA = "Zhang et al., NeurIPS 2020"
MULDE = "Wang et al., WWW 2021, as in Zhu et al., WSDM 2022"
DUALDE = "Zhu et al., WSDM 2022"


@dataclass(frozen=True)
class Published:
    """A model of a paper. mrr: on test. source: who says so.

    row: numbers per entity, with the bias that candidates have. relation: numbers per row of the relations' tables in
    the authors' code; each relation has a row for either direction.
    """

    name: str
    source: str
    mrr: float
    row: int
    relation: int

    def bytes_per_entity(self, entities: int, relations: int) -> float:
        """Of tables in float32 on a graph of so many, relations included."""
        return 4 * (self.row + 2 * relations * self.relation / entities)


# RotH: two translations, a rotation and a curvature per relation; AttH: also a reflection and attention.
_ROTH = {"row": 32 + 1, "relation": 3 * 32 + 1}
_ATTH = {"row": 32 + 1, "relation": 5 * 32 + 1}
# By sha256 of train, valid and test as `Graph.sha256` has it.
RECORDS: dict[str, tuple[Published, ...]] = {
    # WN18RR
    "8cedafb8f7042e1e54ad8a6fb0a07964d02a2c823952c864874a97d75853ccf8": (
        Published("RotH 32", CHAMI, 0.473, **_ROTH),
        Published("MulDE 32", MULDE, 0.481, **_ROTH),
        Published("M-DualDE 32", DUALDE, 0.483, **_ROTH),
        Published("RotE 500", CHAMI, 0.494, row=500 + 1, relation=2 * 500),
        Published("RESCAL-DURA 256", DURA, 0.498, row=256, relation=256 * 256),
    ),
    # FB15k-237
    "5a355d584b6a6726a05d9f36479d88bfaa4fbcbaf4354869aae69f332889f0db": (
        Published("RotH 32", CHAMI, 0.314, **_ROTH),
        Published("AttH 32", CHAMI, 0.324, **_ATTH),
        Published("MulDE 32", MULDE, 0.328, **_ROTH),
        Published("M-DualDE 32", DUALDE, 0.328, **_ROTH),
        Published("RESCAL-DURA 512", DURA, 0.368, row=512, relation=512 * 512),
        Published("ComplEx-DURA 4000", DURA, 0.371, row=4000, relation=4000),
    ),
}


def records_beside(report: RunReport) -> tuple[Published, ...]:
    """Those that can be compared with a run's figures: of its data and protocol, on test."""
    same = report.protocol.get("ties") == "realistic" and report.protocol.get("filter") == "filtered"
    return RECORDS.get(report.data.sha256, ()) if same and report.shown_split == "test" else ()
