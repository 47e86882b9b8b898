"""Which part of a photograph is the object, and the object in the middle of a square."""

import importlib.util

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from errors import UserError, say

BORDER = (
    0.2  # share of the square that stays free beside the object's longer side (stable-dreamfusion's preprocess_image)
)
SIZE = 512  # of the square, pixels
WORK = 480  # longer side at which GrabCut looks, pixels
ROUNDS = 6
FRAME = 0.02  # share of the picture at its border that is surely background
COMMON = 8  # colours that describe the frame
STRANGE = 1.5  # times the distance that 95 % of the frame's own pixels keep to the nearest of them: probably object
JUST_SEEN = 5.0  # and at least so far, in units of Lab
PIECE = 0.1  # a separate piece belongs to the object if it has this share of the largest one's area
HOLE = 0.004  # share of the object's area up to which a hole in it is an error

Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of a picture's width and height


def cut_out(rgb: Float[Tensor, "H W 3"], label: str, box: Box | None = None) -> Float[Tensor, "H W 1"]:
    """Coverage by the object in [0, 1]: by rembg where it is installed and has its weights, else by GrabCut; says which in one line.

    box: all of the object lies within. UserError if nothing that could be an object stands out.
    """
    pixels = (rgb * 255).round().byte().numpy()
    part = _part(box or (0.0, 0.0, 1.0, 1.0), *pixels.shape[:2])
    inside, how = _by_rembg(pixels[part], label), "rembg"
    if inside is not None:
        mask = torch.zeros(*pixels.shape[:2], 1)
        mask[part] = inside
    else:
        mask = _by_grabcut(pixels, label, box)
        how = f"GrabCut, which looks for what differs from {'what is outside the box' if box else 'the border'}"
    share = float((mask > 0.5).float().mean())
    if share < 1e-3:
        raise UserError(
            f"{label}: no object stands out; give a picture with an alpha channel, or tell scripts/preprocess_image.py where it is: --box"
        )
    say(f"{label}: no alpha channel; cut out with {how} ({share:.0%} of the picture is object): look at the result")
    return mask


def box_of(mask: Float[Tensor, "H W 1"]) -> tuple[int, int, int, int]:
    """Top, bottom, left, right (exclusive ends) of what is covered by more than half; UserError if nothing is."""
    inside = mask[..., 0] > 0.5
    rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
    if not len(rows):
        raise UserError("the mask is empty: nothing of an object is left")
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def centred(
    mask: Float[Tensor, "H W 1"], *layers: Float[Tensor, "H W _"], size: int = SIZE, border: float = BORDER
) -> tuple[Float[Tensor, "S S _"], ...]:
    """The layers with the mask's box in the middle of a square of `size` pixels, its longer side 1 - border of the square's.

    Zeros where the picture does not reach. Averaged over areas where it shrinks, bilinear where it grows.
    """
    top, bottom, left, right = box_of(mask)
    side = max(round(max(bottom - top, right - left) / (1 - border)), 1)
    first_row, first_column = round((top + bottom - side) / 2), round((left + right - side) / 2)
    height, width = mask.shape[:2]
    missing = (-first_column, first_column + side - width, -first_row, first_row + side - height)
    found = []
    for layer in layers:
        x = F.pad(layer.permute(2, 0, 1)[None], missing)  # negative padding crops
        grow = {"mode": "area"} if size <= side else {"mode": "bilinear", "align_corners": False}
        found.append(F.interpolate(x, (size, size), **grow)[0].permute(1, 2, 0))
    return tuple(found)


def _by_rembg(pixels: UInt8[np.ndarray, "H W 3"], label: str) -> Float[Tensor, "H W 1"] | None:
    """None where rembg is not installed or cannot be used, which is said."""
    if importlib.util.find_spec("rembg") is None:
        return None
    try:
        import rembg

        alpha = rembg.remove(np.ascontiguousarray(pixels), only_mask=True)
    except Exception as error:  # weights that cannot be downloaded, a broken runtime: none of it the picture's fault
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        say(f"{label}: rembg cannot be used ({reason})")
        return None
    return torch.from_numpy(np.asarray(alpha, np.float32).reshape(*pixels.shape[:2], 1) / 255)


def _part(box: Box, height: int, width: int) -> tuple[slice, slice]:
    """The rows and the columns within a box, one of each at least."""
    top, bottom = round(box[1] * height), round(box[3] * height)
    left, right = round(box[0] * width), round(box[2] * width)
    return slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1))


def _by_grabcut(pixels: UInt8[np.ndarray, "H W 3"], label: str, box: Box | None) -> Float[Tensor, "H W 1"]:
    """GrabCut (Rother et al. 2004) at most `WORK` pixels wide, begun from a box, or from what differs from the border; then loose pieces
    go, small holes are closed and the edge is made soft over a pixel."""
    try:
        import cv2
    except ImportError:
        raise UserError(
            f"{label}: has no alpha channel; cutting it out needs pip install opencv-python-headless (or rembg)"
        ) from None
    height, width = pixels.shape[:2]
    scale = min(1.0, WORK / max(height, width))
    small = (max(2, round(width * scale)), max(2, round(height * scale)))
    image = cv2.cvtColor(cv2.resize(pixels, small, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2BGR)
    if box is None:
        labels = _first_guess(image)
    else:
        labels = np.full(image.shape[:2], cv2.GC_BGD, np.uint8)
        labels[_part(box, *image.shape[:2])] = cv2.GC_PR_FGD
    cv2.setRNGSeed(1)
    models = np.zeros((2, 1, 65))
    try:
        cv2.grabCut(image, labels, None, *models, ROUNDS, cv2.GC_INIT_WITH_MASK)
    except cv2.error:  # one of the two sides has no pixels
        return torch.zeros(height, width, 1)
    inside = _tidied((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD))
    soft = cv2.GaussianBlur(inside.astype(np.float32), (0, 0), 0.7)
    return torch.from_numpy(cv2.resize(soft, (width, height), interpolation=cv2.INTER_LINEAR))[..., None].clamp(0, 1)


def _first_guess(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
    """GrabCut's labels: the frame is background; inside, what is far in Lab from every common colour of the frame is probably object."""
    import cv2

    height, width = image.shape[:2]
    rim = max(2, round(FRAME * max(height, width)))
    frame = np.ones((height, width), bool)
    frame[rim:-rim, rim:-rim] = False
    lab = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_BGR2LAB), (0, 0), 1.5).astype(np.float32)
    cv2.setRNGSeed(1)
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_MAX_ITER, 20, 0.5)
    common = min(COMMON, int(frame.sum()))
    _, _, colours = cv2.kmeans(lab[frame], common, None, criteria, 2, cv2.KMEANS_PP_CENTERS)
    away = np.sqrt(((lab[:, :, None] - colours) ** 2).sum(-1)).min(-1)
    likely = away > max(STRANGE * np.percentile(away[frame], 95), JUST_SEEN)
    share = likely[~frame].mean() if (~frame).any() else 0.0
    if not 0.005 < share < 0.9:  # nothing stands out by its colour: the middle, then
        likely = np.zeros_like(likely)
        likely[height // 5 : -(height // 5), width // 5 : -(width // 5)] = True
    labels = np.where(likely, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[frame] = cv2.GC_BGD
    return labels


def _tidied(inside: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Without thin lines, small loose pieces and what else comes in from the border, and with small holes closed."""
    import cv2

    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    opened = cv2.morphologyEx(inside.astype(np.uint8), cv2.MORPH_OPEN, disc)
    _, parts, facts, _ = cv2.connectedComponentsWithStats(opened, connectivity=8)
    areas = facts[1:, cv2.CC_STAT_AREA]
    if not len(areas):
        return inside
    x, y, w, h = (facts[1:, i] for i in (cv2.CC_STAT_LEFT, cv2.CC_STAT_TOP, cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT))
    rim = max(2, round(FRAME * max(inside.shape))) + 1
    within = (np.minimum(x, y) > rim) & (x + w < inside.shape[1] - rim) & (y + h < inside.shape[0] - rim)
    keep = np.isin(parts, 1 + np.nonzero((areas >= PIECE * areas.max()) & (within | (areas == areas.max())))[0])
    _, holes, facts, _ = cv2.connectedComponentsWithStats((~keep).astype(np.uint8), connectivity=4)
    small = 1 + np.nonzero(facts[1:, cv2.CC_STAT_AREA] <= HOLE * keep.sum())[0]
    return keep | np.isin(holes, small)
