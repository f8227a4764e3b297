"""Table 1: base, LoRA and full fine-tuning of the dense and the PMP model, as an outsider without the mask.

    python experiments/table1.py --scale laptop

Beside the paper's rows the control: the same model fine-tuned from random initialisation. A column in which the dense
model does not beat it says nothing about fine-tunability.
"""

from common import BASE, FULL, LORA, SCRATCH, columns, markdown, mean_sd, run

STAGES = [(SCRATCH, "dense", "from random weights"), *((adversary, variant, label) for adversary in (BASE, LORA, FULL)
                                                       for variant, label in (("dense", "w/o PMP"), ("pmp", "PMP")))]


def script(lab):
    names = [(task, column) for task in lab.scale.tasks for column in columns(task)]
    rows = [[adversary.name, label, *(mean_sd(lab.scores(variant, task, adversary, column=column))
                                      for task, column in names)] for adversary, variant, label in STAGES]
    header = [column + " (stand-in)" * task.startswith("standin/") for task, column in names]
    return markdown(["stage", "variant", *header], rows)


if __name__ == "__main__":
    run(script, __doc__)
