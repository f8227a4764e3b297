"""How GLUE's files are laid out. glue.py reads the official ones, standin.py writes others like them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The folder of a task in the official zips, and the columns of its files, by name."""

    folder: str
    columns: tuple
    text: tuple  # the columns of the sentence or the two sentences
    label: str
    headed: bool = True  # the first line of a file names the columns


LAYOUTS = {  # in the order of the paper's Table 1
    "cola": Layout("CoLA", ("source", "label", "star", "sentence"), ("sentence",), "label", headed=False),
    "sst2": Layout("SST-2", ("sentence", "label"), ("sentence",), "label"),
    "mrpc": Layout("MRPC", ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"), ("#1 String", "#2 String"),
                   "Quality"),
    "qqp": Layout("QQP", ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"), ("question1", "question2"),
                  "is_duplicate"),
    "stsb": Layout("STS-B", ("index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1",
                             "sentence2", "score"), ("sentence1", "sentence2"), "score"),
    # the development files have five annotators' labels before the last column
    "mnli": Layout("MNLI", ("index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse",
                            "sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1", "gold_label"),
                   ("sentence1", "sentence2"), "gold_label"),
    "qnli": Layout("QNLI", ("index", "question", "sentence", "label"), ("question", "sentence"), "label"),
    "rte": Layout("RTE", ("index", "sentence1", "sentence2", "label"), ("sentence1", "sentence2"), "label"),
}
