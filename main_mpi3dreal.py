"""Train and evaluate one pair of encoders on MPI3D-Complex: photographs and generated captions.

    python main_mpi3dreal.py --bias-type selection --bias-id 0     # captions speak of the colour alone
    python main_mpi3dreal.py --bias-type perturbation --bias-id 2  # camera and background are stated wrongly
    python main_mpi3dreal.py --bias-id 0 --encoding-size 1         # encodings of one dimension
    python main_mpi3dreal.py --recipe fast --bias-id 2             # fewer steps, at a larger learning rate
    python main_mpi3dreal.py --model-id NAME --resume              # continue a run that was stopped
    python main_mpi3dreal.py --model-id NAME --evaluate --seed 7   # probe a trained model again

--datapath is the folder of the images, with the captions of rendering_data/MPI3D/render_multimodal_mpi3d.py in it.
A model directory holds args.json, encoder_img.pt, encoder_txt.pt, checkpoint.pt, train_log.csv, results.csv, .png, geometry.csv.
"""

from running.command_line import run_script

# isort: split
import pandas as pd

from datasets import BIAS_IDS, BIAS_TYPES, MPI3D_GRID, MPI3D_MEAN, MPI3D_STD, load_mpi3d, mpi3d_bias
from image_text import MODALITIES, ImageTextExperiment
from probes import ABSENT, LEARNED
from running.experiment import names_of, run_experiment
from running.pictures import plot_factor_scores

# "paper": exactly the paper's training. "fast": few steps with few pairs, at a rate that falls from a larger one.
RECIPES = {
    "paper": dict(init="default", lr=1e-5, text_lr_factor=1.0, lr_schedule="constant", layer_lr="uniform", optimiser="adam",
                  preconditioner="none", batch_size=256, final_batch_size=0, train_steps=200_001, precision="fp32", first_tau=0,
                  first_batch_size=0, spare_dimensions=0, whitening_pairs=0, norm_penalty=0),
    "fast": dict(
        init="he", lr=1e-3, lr_schedule="onecycle", layer_lr="uniform", optimiser="adam", preconditioner="none",
        batch_size=64, final_batch_size=0, train_steps=3_000, precision="auto", first_batch_size=0,
        spare_dimensions=0,
        text_lr_factor=0.1,  # a text encoder that moves more slowly does not give up what the image encoder has not found yet
        first_tau=0.06,  # at τ = 1 few places on the sphere are as good as many; it must end there, see docs/fast-recipe.md
        whitening_pairs=256,  # drawn weights send all encodings into a narrow cone; whitened ones use every dimension
        norm_penalty=1.0,  # lengths, which the cosine does not see, forget what images alone show
    ),
}  # fmt: skip
SMALLEST_ENCODING = 3  # dimensions, where fewer semantics are unbiased


class Mpi3dExperiment(ImageTextExperiment):
    """One model of MPI3D-Complex; both encodings are probed for what images show."""

    name, recipes, datapath = "mpi3d", RECIPES, "data/MPI3d_real_complex"
    bias_types, bias_ids, bias, open = BIAS_TYPES, BIAS_IDS, staticmethod(mpi3d_bias), staticmethod(load_mpi3d)
    bias_help = (
        "selection: 0 colour alone, + 1 shape, + 2 size, + 3 camera, + 4 background; perturbation: the number of factors "
        "stated wrongly, of background, camera, size, shape"
    )
    smallest = f"number of unbiased semantics, at least {SMALLEST_ENCODING}"
    mean, std, perturbing, own_text_factors = MPI3D_MEAN, MPI3D_STD, "wrong in {:.0%} of captions", False
    columns = (("ix", "ix"), ("modality", "modality"), ("semantic_name", "factor_name"),
               ("mcc_logreg", "mcc_logreg"), ("mcc_mlp", "mcc_mlp"))  # fmt: skip

    @staticmethod
    def default_encoding_size(unbiased):
        """The number of unbiased semantics: fewer than three dimensions of a sphere do not learn."""
        return max(SMALLEST_ENCODING, unbiased)

    @classmethod
    def factors(cls, bias, modality):
        """All seven."""
        return list(MPI3D_GRID)

    def show(self, results, path, references):
        """Print the table and the verdict, and draw both heatmaps."""
        unbiased, tables = self.setting.unbiased, score_tables(results)
        printed = pd.concat({title: scores.T for title, scores in tables.items()}, axis=1)
        printed.index = [f"{name} *" if name in unbiased else name for name in printed.index]
        printed.columns.names = [None, None]
        print(printed.clip(lower=0).round(3).to_string(), "(* unbiased)", sep="\n")
        title = f"{self.args.bias_type} bias, setting {self.args.bias_id}"
        references = {name: score_tables(scores) for name, scores in references.items()}
        plot_factor_scores(tables, path, title, set(unbiased), references)
        if not self.args.supervised:
            print(verdict(results, self.setting))


def score_tables(results):
    """Dict title → DataFrame (image, text × factors) of linear and of nonlinear MCC."""
    tables = {}
    for score, title in (("mcc_logreg", "linear"), ("mcc_mlp", "nonlinear")):
        table = results.pivot(index="modality", columns="factor_name", values=score)
        tables[f"{title} MCC"] = table[list(MPI3D_GRID)].loc[list(MODALITIES)]
    return tables


def verdict(results, bias):
    """One sentence: whether exactly the unbiased factors were learned."""
    inside = results.factor_name.isin(bias.unbiased)
    lowest, highest = results[inside].mcc_mlp.min(), max(results[~inside].mcc_mlp.max(), 0)
    found = f"{names_of(bias.unbiased)} has nonlinear MCC of at least {lowest:.3f}, everything else at most {highest:.3f}"
    if lowest >= LEARNED and highest <= ABSENT:
        return f"Exactly the unbiased block is learned: {found}."
    return f"Not (yet) the pattern of the theory: {found}."


def main(argv=None):
    """Train and evaluate, or with --evaluate evaluate again; returns the exit code."""
    return run_experiment(Mpi3dExperiment, argv)


if __name__ == "__main__":
    run_script(main)
