"""How the tests run each command of the documentation; tests/docs/test_commands.py holds this table complete.

A `*` in a key stands for anything. Every command matches exactly one key, every key at least one command.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """Run as it stands in the page, in the folder of tests/docs/sites.py with its small data and configs.

    leaves: what is there afterwards. codes: allowed exit codes. needs: a module that it cannot do without.
    """

    leaves: str = "."
    codes: tuple[int, ...] = (0,)
    needs: str | None = None


@dataclass(frozen=True)
class Slow(Run):
    """As `Run`, after all others and by the slow tests alone."""


@dataclass(frozen=True)
class Elsewhere:
    """Run by another test in its own surroundings. test: PATH::NAME. why: it does not run in the shared folder."""

    test: str
    why: str


@dataclass(frozen=True)
class Parsed:
    """Not run; its program, flags, configs and names are checked. why: no test can. test: what checks the rest."""

    why: str
    test: str | None = None


How = Run | Elsewhere | Parsed

BENCH = "tests/benchmarks/test_bench.py::"
SERVERS = "tests/docs/test_servers.py::"
PORT = "it serves until it is stopped; there it stands in the same folder and has a port of its own"
APART = "tests/pipeline/ray/test_apart.py::"
CLUSTER = "tests/pipeline/ray/test_session.py::"
ITSELF = "it is what runs these tests, or checks them; continuous integration calls it"
MEASURES = "a measurement of minutes to hours; its results are in benchmarks/results"
INSTALLS = "the test would install what it is testing with; the extra is looked up in pyproject.toml"

TABLE: dict[str, How] = {
    # -- make and shell
    "make demo": Run("runs/demo/report.html"),
    "make test": Parsed(ITSELF),
    "make site": Parsed("tests/docs/test_site.py builds it"),
    "make PYTHON=python3.12 demo": Parsed("this machine may have no such Python"),
    "PIP_EXTRA_INDEX_URL=* make demo": Parsed("it downloads torch"),
    "make bench-engine": Parsed(MEASURES),
    "make resolve": Parsed("it asks package indexes"),
    "make PYTHON=python3.12 test-oldest": Parsed(INSTALLS),
    ". .venv/bin/activate": Parsed("python -m venv writes it"),
    "export RAY_AUTH_MODE=token": Run(),
    "pip install *": Parsed(INSTALLS),
    # -- plans
    "distkgd update *": Elsewhere(
        "tests/pipeline/test_update.py::test_a_student_is_taught_again_by_its_updated_teacher",
        "it needs a graph that grew",
    ),
    "distkgd configs": Run(),
    "distkgd configs umls --out my_configs": Run("my_configs/umls/bkd_complex.yaml"),
    "distkgd distill * --dry-run": Run(),
    "distkgd distill --out runs/first": Run("runs/first/report.html"),
    "distkgd distill --data my_triples.tsv --to 32": Run("runs/my_triples_32/report.html"),
    "distkgd distill --data my_triples.tsv --to 32 student.method=*": Run("runs/mine_dualde/report.html"),
    "distkgd distill --data my_triples.tsv --to 256 --bits 4": Run("runs/my_triples_256_4bit/report.html"),
    # 3: no crop of the small run keeps enough, or this machine is too slow, and it says so.
    "distkgd distill --data my_triples.tsv --max-mb 20 *": Run(codes=(0, 3)),
    "distkgd distill runs/my_triples_32/config.yaml --out runs/again": Run("runs/again/report.html"),
    "distkgd distill --data my_graph --out runs/mine": Run("runs/mine/report.html"),
    "distkgd distill --data my_graph teacher=pykeen:results *": Run("runs/taught/imported", needs="pykeen"),
    "distkgd distill configs/wn18rr/dualde_complex.yaml": Run("runs/wn18rr_dualde_complex/report.html"),
    "distkgd distill configs/wn18rr/dualde_complex.yaml --resume": Run(),
    "torchrun * launch/distill.py configs/wn18rr/dualde_complex.yaml *": Run("runs/two_ranks/report.html"),
    "torchrun --standalone --max-restarts 3 *": Slow("runs/restarts/report.html"),
    "torchrun --standalone --nproc-per-node 2 launch/distill.py --out runs/demo2": Slow("runs/demo2/report.html"),
    "python -m benchmarks.serve_packed*": Parsed(MEASURES),
    "python -m benchmarks.bits": Parsed(MEASURES),
    "distkgd distill student.bits=1 --out runs/demo1": Run("runs/demo1/report.html"),
    "distkgd distill student.method=dualde *": Run("runs/dualde/report.html"),
    "distkgd distill --resume --out runs/demo1 student.bits=1": Run(),
    "distkgd distill 'chain.bits=[8, 4, 2]' *": Run("runs/chain/stages/student_8bit/model"),
    "distkgd distill configs/umls/chain_bkd_complex.yaml": Run("runs/umls_chain_bkd_complex/report.html"),
    "distkgd distill configs/umls/chain_bkd_complex.yaml student.start=crop *": Run("runs/crop/report.html"),
    "distkgd distill configs/umls/ta_complex.yaml": Run("runs/umls_ta_complex/report.html"),
    "distkgd distill configs/umls/med_complex.yaml": Run("runs/umls_med_complex/report.html"),
    "distkgd distill configs/umls/metasd_complex.yaml": Run("runs/umls_metasd_complex/report.html"),
    # -- finished models
    "distkgd evaluate *": Run("test.json"),
    "torchrun * launch/evaluate.py *": Run(),
    "distkgd predict *": Run(),
    "distkgd report *": Run(),
    "distkgd export runs/demo/stages/student exported --format numpy": Run("exported/entity.npy"),
    "distkgd export runs/demo/stages/teacher exported_packed *": Run("exported_packed/config.json"),
    "distkgd export runs/demo/stages/teacher cropped *": Run("cropped/entity.safetensors"),
    "distkgd export runs/my_triples_32/*": Run("exported_parquet/entity.parquet", needs="pyarrow"),
    "distkgd export runs/umls_med_complex/*": Run("med16/entity.safetensors"),
    "distkgd export runs/umls_metasd_complex/*": Run("pruned/config.json"),
    "distkgd export runs/demo/stages/teacher labels *": Run("labels/labels.json"),
    "distkgd distill teacher=null *": Run("runs/cached/report.html"),
    "distkgd import pykeen:results *": Run("imported/config.json", needs="pykeen"),
    "distkgd register *": Run("mlflow.db", needs="mlflow"),
    "mlflow ui *": Elsewhere(SERVERS + "test_the_pages_of_mlflow_are_served", PORT),
    "mlflow models serve *": Elsewhere(SERVERS + "test_a_registered_model_is_served_and_answers", PORT),
    "curl *": Elsewhere(SERVERS + "test_a_registered_model_is_served_and_answers", "it asks that server"),
    # -- Ray
    "distkgd chain configs/umls/chain_bkd_complex.yaml*": Run("runs/ray_chain/timeline.json", needs="ray"),
    "distkgd chain configs/umls/ta_complex.yaml --workers *": Slow("runs/ray_ta/timeline.json", needs="ray"),
    "distkgd chain configs/umls/ta_complex.yaml --resume *": Slow("runs/ray_ta/timeline.json", needs="ray"),
    "distkgd chain * --address auto *": Elsewhere(
        APART + "test_a_student_fetches_its_teachers_and_goes_on_on_another_node_when_its_own_is_gone",
        "it wants a cluster that is up, with nodes of their own",
    ),
    "distkgd reproduce": Run(),
    "distkgd reproduce *": Elsewhere(
        "tests/pipeline/sweep/test_sweep.py::test_a_table_of_a_paper_is_foreseen_trained_and_shown_beside_its_figures",
        "the papers' tables take hours; there it is a toy's",
    ),
    "distkgd ablate *": Slow("runs/codex-s_dualde_table7/chart.svg", needs="ray"),
    "ray get-auth-token --generate": Slow(needs="ray"),
    "ray up *": Parsed("it rents machines", CLUSTER + "test_the_example_of_a_cluster_is_one_that_ray_takes"),
    "ray dashboard *": Parsed("of rented machines", CLUSTER + "test_the_example_of_a_cluster_is_one_that_ray_takes"),
    "ray down *": Parsed("of rented machines", CLUSTER + "test_the_example_of_a_cluster_is_one_that_ray_takes"),
    "ray job submit *": Parsed("to rented machines", CLUSTER + "test_the_example_of_a_job_is_a_runtime_environment"),
    # -- measurements
    "python -m benchmarks.side_by_side --list": Run(),
    "python -m benchmarks.side_by_side --quick --json bench.json": Slow("bench.json"),
    "python -m benchmarks.side_by_side --task train/transe --task load": Elsewhere(
        BENCH + "test_a_run_in_real_processes_with_a_peer_that_is_not_installed", MEASURES
    ),
    "python -m benchmarks.side_by_side inference --run runs/demo": Slow(),
    "python -m benchmarks.side_by_side --quick --compare bench.json": Parsed(
        MEASURES, BENCH + "test_the_launcher_exits_1_and_names_the_tasks_whose_ratio_fell"
    ),
    "python benchmarks/tables.py benchmarks/tables/umls_16.yaml": Parsed(
        MEASURES, "tests/benchmarks/test_tables.py::test_every_trial_is_a_plan"
    ),
    "python benchmarks/nested.py codex-s": Parsed(
        MEASURES, "tests/benchmarks/test_nested.py::test_one_nested_model_stands_beside_all_its_sizes"
    ),
    "python benchmarks/engine.py project": Run(),
    "python benchmarks/serving.py": Parsed(MEASURES),
    "python benchmarks/own.py": Parsed(MEASURES),
    "python benchmarks/classification.py": Parsed(MEASURES),
    "python benchmarks/questions.py": Parsed(MEASURES),
    "python benchmarks/growth.py *": Parsed(MEASURES),
    "python docs/make_reference.py": Elsewhere(
        "tests/docs/test_reference.py::test_the_pages_are_written_where_they_belong",
        "it would write into this checkout",
    ),
}


def pattern(key: str) -> re.Pattern[str]:
    """What a key matches."""
    return re.compile(".*".join(map(re.escape, key.split("*"))))


def keys_of(command: str) -> list[str]:
    """The keys that match a command; one, if all is well."""
    exact = [key for key in TABLE if key == command]
    return exact or [key for key in TABLE if pattern(key).fullmatch(command)]


def how(command: str) -> How:
    """What is done about a command."""
    (key,) = keys_of(command)
    return TABLE[key]
