"""How full first-fit rows are with UL2's denoisers: at as many targets as inputs, and at the recommended lengths.

    python benchmarks/packing.py [--documents FILE.jsonl.gz …]

Counted on real batches made from the token cache; a position counts if it is not padding. The figures depend on the
documents, not on the machine. The table in docs/objectives.md is what this prints.
"""

import argparse
import json
import tempfile
from pathlib import Path

from common import RESULTS, environment

from t5x_domain.data.cache import TokenCache
from t5x_domain.data.curriculum import Phase
from t5x_domain.data.lengths import recommend
from t5x_domain.data.loader import Batches
from t5x_domain.data.mixtures import mixture_of_denoisers
from t5x_domain.data.packing import EncoderDecoder
from t5x_domain.data.preparation import prepare
from t5x_domain.data.sources import JsonlSource
from t5x_domain.data.tasks import Corpus
from t5x_domain.data.vocabulary import Vocabulary

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "`ul2_442`": {"denoisers": "ul2_442"},
    "`ul2_442`, mode tokens with ids of their own": {"denoisers": "ul2_442", "mode_form": "id"},
    "`ul2_442`, `split = 'uniform'`": {"denoisers": "ul2_442", "split": "uniform"},
    "`ul2_uniform7`": {"denoisers": "ul2_uniform7"},
    "`ul2r_502525`": {"denoisers": "ul2r_502525"},
    "`t5`": {"denoisers": "t5"},
}
BATCHES = 8


def measure(mixture, splits, vocabulary, lengths):
    batches = Batches(
        splits,
        mixture,
        vocabulary,
        lengths=lengths,
        layout=EncoderDecoder(),
        batch_size=64,
        seed=0,
        packing="first_fit",
    )
    stats = batches.packing_stats(range(BATCHES))
    return {**lengths, **{name: getattr(stats, name) for name in ("encoder", "decoder", "both", "dropped_share")}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sample = [str(ROOT / "data/sample" / f"{name}.jsonl.gz") for name in ("biomedical", "general")]
    parser.add_argument("--documents", nargs="+", default=sample, help="JSONL files, each a corpus at equal rate")
    parser.add_argument("--vocabulary_size", type=int, default=6000, help="pieces to train on the documents")
    parser.add_argument("--output", default=str(RESULTS / "packing.json"))
    flags = parser.parse_args()
    corpora = [Corpus(Path(file).name.partition(".")[0], JsonlSource({"train": file})) for file in flags.documents]
    mixtures = {name: mixture_of_denoisers(corpora, **setting) for name, setting in SETTINGS.items()}
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Vocabulary(f"{folder}/vocabulary.model", extra_ids=256)
        phases = [Phase(mixture) for mixture in mixtures.values()]
        prepare(phases, vocabulary, folder, vocabulary_size=flags.vocabulary_size, inputs_length=None)
        splits = [TokenCache.open(folder, corpus.name).split("train") for corpus in corpora]
        results = []
        for name, mixture in mixtures.items():
            for inputs in (512, 1024):
                best = recommend(mixture, splits, vocabulary, inputs)[0].targets
                equal, chosen = (
                    measure(mixture, splits, vocabulary, {"inputs": inputs, "targets": targets})
                    for targets in (inputs, best)
                )
                results.append({"mixture": name, "equal": equal, "recommended": chosen})
    report = {"environment": environment("numpy", "grain"), "results": results}
    Path(flags.output).write_text(json.dumps(report, indent=1) + "\n")
    print("| mixture | inputs / targets | encoder | decoder | both | no room | with targets = inputs |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for row in results:
        chosen = row["recommended"]
        shares = [chosen[name] for name in ("encoder", "decoder", "both", "dropped_share")] + [row["equal"]["both"]]
        cells = [row["mixture"], f"{chosen['inputs']:,} / {chosen['targets']:,}", *(f"{share:.1%}" for share in shares)]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
