"""Train and evaluate one pair of encoders on Causal3DIdent: rendered scenes and generated captions.

    python main_causal3dident.py --bias-type selections --bias-id 0     # captions speak of the shape alone
    python main_causal3dident.py --bias-type perturbations --bias-id 2  # colours of background and spotlight are stated wrongly
    python main_causal3dident.py --recipe fast --bias-id 2              # fewer steps, at a larger learning rate
    python main_causal3dident.py --model-id NAME --resume               # continue a run that was stopped
    python main_causal3dident.py --model-id NAME --evaluate --seed 7    # probe a trained model again

--datapath is the folder that the scripts in rendering_data/Causal3DIdent make; its images are decoded once, into a file
beside them. The paper numbers the perturbations the other way round: its setting k is --bias-id 7 − k.
A model directory holds args.json, encoder_img.pt, encoder_txt.pt, checkpoint.pt, train_log.csv, results.csv, .png, geometry.csv.
"""

from running.command_line import run_script

# isort: split
import pandas as pd

import datasets
from image_text import MODALITIES, ImageTextExperiment
from probes import ABSENT, FOUND
from reading.causal3dident import CAUSAL_BIAS_IDS, CAUSAL_BIAS_TYPES, CAUSAL_IMAGE, RUNS_SPELLING, causal_text_factor
from running.experiment import names_of, run_experiment
from running.pictures import plot_factor_scores

# "paper": exactly the paper's training. "fast": few steps with few pairs, at a rate that falls from a larger one.
RECIPES = {
    "paper": dict(init="default", lr=1e-5, text_lr_factor=1.0, lr_schedule="constant", layer_lr="uniform", optimiser="adam",
                  preconditioner="none", batch_size=256, final_batch_size=0, train_steps=100_001, precision="fp32", first_tau=0,
                  first_batch_size=0, spare_dimensions=0, whitening_pairs=0, norm_penalty=0),
    "fast": dict(init="he", lr=1e-3, lr_schedule="onecycle", layer_lr="uniform", preconditioner="none", batch_size=64,
        final_batch_size=0, train_steps=3_000, precision="auto",
        text_lr_factor=1.0,  # at a tenth of it both encoders find the shape later
        optimiser="muon",  # its steps follow weak directions as far as strong ones: the shape beside places and colours
        first_tau=0.06,  # at τ = 1 few places on the sphere are as good as many; it must end there, see docs/fast-recipe.md
        first_batch_size=128,  # places and colours alone tell the pairs of a small batch apart
        spare_dimensions=25,  # both encoders find the shape before places and colours fill the space
        whitening_pairs=256,  # drawn weights send all encodings into a narrow cone; whitened ones use every dimension
        norm_penalty=1.0),  # lengths, which the cosine does not see, forget what images alone show
}  # fmt: skip
ENCODING_SIZES = (3, 3, 4, 5, 5, 6, 7)  # dimensions for 1 … 7 unbiased semantics


class Causal3dIdentExperiment(ImageTextExperiment):
    """One model of Causal3DIdent; image encodings are probed for what images show, text encodings for what captions state."""

    name, recipes, datapath = "causal3dident", RECIPES, "data/Causal3DIDent"
    bias_types, bias_ids, bias = CAUSAL_BIAS_TYPES, CAUSAL_BIAS_IDS, staticmethod(datasets.causal_bias)
    bias_help = ("selections: 0 shape alone, + 1 xpos, + 2 ypos, + 3 spotlight_pos, colours of + 4 object, + 5 spotlight, "
                 "+ 6 background; perturbations: how many are stated wrongly, from background_color to xpos")  # fmt: skip
    smallest = f"{', '.join(map(str, ENCODING_SIZES))} for 1 … {len(ENCODING_SIZES)} unbiased semantics"
    default_encoding_size = staticmethod(lambda unbiased: ENCODING_SIZES[unbiased - 1])
    mean, std, open = datasets.CAUSAL_MEAN, datasets.CAUSAL_STD, staticmethod(datasets.load_causal3dident)
    perturbing, own_text_factors, spelling = "drawn anew for the caption", True, RUNS_SPELLING

    @classmethod
    def factors(cls, bias, modality):
        """All of the image; of the caption what it states, and its phrasing."""
        return list(CAUSAL_IMAGE) if modality == "image" else [*map(causal_text_factor, bias.selected), "text_phrasing"]

    def table(self, results):
        """As the runs wrote it: with an index, in their spelling, and the image's factors counted with z position, number 3."""
        ix = results.ix + ((results.modality == "image") & (results.ix > 2))
        return super().table(results.assign(ix=ix)).reset_index(names="")

    def show(self, results, path, references):
        """Print both tables and the verdict, and draw them: R² of continuous factors, MCC of discrete ones."""
        unbiased = {*self.setting.unbiased, *map(causal_text_factor, self.setting.unbiased)}
        for title, scores in (tables := score_tables(results)).items():
            types = results.set_index(["modality", "factor_name"]).factor_type[title.split()[0]]
            printed = scores.T.clip(lower=0).round(3)
            printed.insert(0, "score", types.map({"continuous": "R²", "discrete": "MCC"}))
            printed.index = [f"{name} *" if name in unbiased else name for name in printed.index]
            print(title, printed.to_string(), sep="\n")
        said = [] if self.args.supervised else [verdict(results, self.setting)]
        print("(* unbiased)", *said, sep="\n")
        title = f"{self.args.bias_type}, setting {self.args.bias_id}: R² of continuous factors, MCC of discrete ones"
        plot_factor_scores(tables, path, title, unbiased, {name: score_tables(scores) for name, scores in references.items()})


def score_tables(results):
    """Dict title → DataFrame (linear, nonlinear × factors) of both encodings: R² of continuous factors, MCC of discrete ones."""
    linear, nonlinear = results.r2_linreg.fillna(results.mcc_logreg), results.r2_krreg.fillna(results.mcc_mlp)
    scores = pd.DataFrame({"linear": linear, "nonlinear": nonlinear}).set_index(results.factor_name)
    return {f"{modality} encoding": scores[(results.modality == modality).to_numpy()].T for modality in MODALITIES}


def verdict(results, bias):
    """One sentence: which unbiased discrete factors of the image are found, and whether its rotations stay out."""
    image = results[results.modality == "image"].set_index("factor_name")
    unbiased = [name for name in bias.unbiased if image.factor_type.get(name) == "discrete"]
    found = [name for name in unbiased if image.mcc_mlp[name] >= FOUND]
    missed = [name for name in unbiased if name not in found]
    lowest, highest = image.mcc_mlp[found or unbiased].min(), max(image.filter(like="rot", axis=0).r2_krreg.max(), 0)
    scores = f"nonlinear MCC of at least {lowest:.3f} in the image encoding, the rotations R² of at most {highest:.3f}"
    if not found or highest > ABSENT:
        return f"Not (yet) the pattern of the theory: {names_of(unbiased)} has {scores}."
    if not missed:
        return f"What is unbiased is found, and what is the image's own is not: {names_of(found)} has {scores}."
    return (f"Part of what is unbiased is found, and what is the image's own is not: {names_of(found)} has {scores}; not (yet) "
            f"{names_of(missed)}, with at most {image.mcc_mlp[missed].max():.3f}.")  # fmt: skip


def main(argv=None):
    """Train and evaluate, or with --evaluate evaluate again; returns the exit code."""
    return run_experiment(Causal3dIdentExperiment, argv)


if __name__ == "__main__":
    run_script(main)
