"""What the text encoder of the bundled model knows of "a red circle above a blue square", word by word.

    python -m benchmarks.shapes_text_probe runs/shapes/text --output DIR

A transformer sees the final states and no positions of words: what it is to bind must be in them.  Ridge
regression reads each property from the states at one word.  It learns from prompts of combinations that
captions have; `accuracy` is on other such prompts, `held out` on colours and shapes that no caption puts
together, `untrained` is `accuracy` with random parameters, `chance` the share of the commonest answer.  `share`, of the
states' variance at that word, is what differs between the answers' means (of relations: between opposites, on the axis
with less of it): a probe stretches what is small, a transformer that begins to learn does not.
`both` are prompts without a relation, "a red circle and a blue square".  `restated` is no probe: whether the
model itself says "red" behind "...; the circle is", which it cannot without knowing who has which colour.
"""

import functools
import itertools
import pathlib
import sys

import numpy as np

from benchmarks import environment

COLUMNS = ("at", "what", "accuracy", "held_out", "untrained", "chance", "share")
PROBES = {  # {word: what is read there}; what comes later a causal model cannot know
    "first noun": ("colour of first", "shape of first"),
    "relation": ("relation", "colour of first", "shape of first"),
    "second noun": ("colour of second", "shape of second", "relation", "colour of first", "shape of first"),
    "second noun, both": ("colour of second", "colour of first", "shape of first"),
}
OPENINGS = ("", "a picture of ", "there is ", "please draw ", "the picture shows ")
RIDGE = 1e-3  # of the mean square of the states
LEARN, TEST = 1000, 1000  # prompts


def prompts(rng, count, held_out, related=True):
    """`count` of {"text", "ends": {word: text up to its end}, "labels": {what: number}}."""
    from sana_jax.data.shapes_scene import COLOURS, RELATIONS, SHAPES, held_out_pair
    from sana_jax.data.shapes_words import RELATION_WORDS

    made = []
    while len(made) < count:
        colours, shapes = (rng.choice(len(table), 2, replace=False) for table in (COLOURS, SHAPES))
        names = [(list(COLOURS)[c], SHAPES[s]) for c, s in zip(colours, shapes)]
        if any(held_out_pair(*name) for name in names) != held_out:
            continue
        relation = int(rng.integers(4))
        first, second = (f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}" for colour, shape in names)
        opening = OPENINGS[rng.integers(len(OPENINGS))]  # so that words have no places of their own
        ways = RELATION_WORDS[RELATIONS[relation]] if related else ("and",)
        between = ways[rng.integers(len(ways))]
        ends = itertools.accumulate((opening + first, between, second), lambda before, part: f"{before} {part}")
        words = ("first noun", "relation", "second noun") if related else ("first noun", "and", "second noun, both")
        ends = dict(zip(words, ends))
        labels = {"colour of first": colours[0], "shape of first": shapes[0], "colour of second": colours[1]}
        labels |= {"shape of second": shapes[1], "relation": relation}
        made.append({"text": ends[words[2]], "ends": ends, "labels": labels})
    return made


def states_at(encode, tokenizer, asked, word):
    """Final states at the last token of `word`, float64 [n d]."""
    states = encode([line["text"] for line in asked])
    places = tokenizer.tokenize([line["ends"][word] for line in asked]).mask.sum(axis=1) - 1
    return states[np.arange(len(asked)), places].astype(np.float64)


def fit(x, labels):
    """`answer(x)` -> labels, by ridge regression on one column for each label."""
    mean = x.mean(axis=0)
    centred, wanted = x - mean, np.eye(labels.max() + 1)[labels]
    square = centred.T @ centred
    square += RIDGE * np.trace(square) / len(square) * np.eye(len(square))
    weights = np.linalg.solve(square, centred.T @ (wanted - wanted.mean(axis=0)))
    return lambda x: np.argmax((x - mean) @ weights + wanted.mean(axis=0), axis=1)


def share(x, labels):
    """Of the variance of x [n d], the part that is between the means of the labels."""
    centred, kinds = x - x.mean(axis=0), np.unique(labels)
    between = sum(np.mean(labels == kind) * np.sum(centred[labels == kind].mean(axis=0) ** 2) for kind in kinds)
    return float(between / np.mean(np.sum(centred**2, axis=1)))


def share_between_opposites(x, relation):
    """`share` of the side on the axis where it is less; `relation` numbers RELATIONS, opposites beside each other."""
    axis = relation // 2
    return min(share(x[axis == k], relation[axis == k]) for k in (0, 1))


def accuracies(encode, tokenizer, sets):
    """{(word, what): [accuracy, of held out, share]}; `sets` has lists of prompts (learn, test, held out) by `related`."""
    found = {}
    for word, asked in PROBES.items():
        learn, *tests = sets[not word.endswith("both")]
        x, *others = (states_at(encode, tokenizer, lines, word) for lines in (learn, *tests))
        for what in asked:
            known, *wanted = (np.array([line["labels"][what] for line in lines]) for lines in (learn, *tests))
            answer = fit(x, known)
            found[word, what] = [float((answer(x) == truth).mean()) for x, truth in zip(others, wanted)]
            found[word, what].append((share_between_opposites if what == "relation" else share)(x, known))
    return found


def restated(encode, tokenizer, embedding, asked, which):
    """Share of prompts behind which "; the NOUN is" is continued with the colour of NOUN, among all colours."""
    from sana_jax.data.shapes_scene import COLOURS

    texts = [f"{line['text']}; the {line['ends'][which + ' noun'].split()[-1]} is" for line in asked]
    states = encode(texts)[np.arange(len(texts)), tokenizer.tokenize(texts).mask.sum(axis=1) - 1]
    ids = [tokenizer.tokenize([f"a {colour}"]).ids[0, 2] for colour in COLOURS]
    said = np.argmax(states @ np.asarray(embedding, np.float32)[ids].T, axis=1)
    return float(np.mean(said == [line["labels"][f"colour of {which}"] for line in asked]))


def rows_of(source, learn=LEARN, test=TEST, seed=0):
    """The table of the text encoder in a run's or a model's folder.  Raises InputError: there is none."""
    import jax

    from sana_jax.data.tokens import Tokenizer
    from sana_jax.models.gemma2 import Gemma2
    from sana_jax.programs import text_program
    from sana_jax.training.initialise import open_weights

    gemma2, read = open_weights(source, Gemma2)
    tokenizer = Tokenizer(pathlib.Path(source, "tokenizer"), tokens=24)

    def encoder(params):
        def encode(texts):
            parts = (tokenizer.tokenize(texts[i : i + 500]) for i in range(0, len(texts), 500))
            states = [text_program(params, p.ids, p.mask, p.selection, None, gemma2=gemma2)[0] for p in parts]
            return np.concatenate([np.asarray(part, np.float32) for part in states])

        return encode

    rng = np.random.default_rng(seed)
    sizes = ((learn, False), (test, False), (test, True))
    sets = {related: [prompts(rng, count, held_out, related) for count, held_out in sizes] for related in (True, False)}
    params = read(None)
    trained = accuracies(encoder(params), tokenizer, sets)
    random = gemma2.init(jax.random.key(seed), *gemma2.example_inputs())["params"]
    untrained = accuracies(encoder(random), tokenizer, sets)
    for which, what in (("first", "colour of first"), ("second", "colour of second")):
        for found, values in ((trained, params), (untrained, random)):
            ask = functools.partial(restated, encoder(values), tokenizer, values["embedding"], which=which)
            found["restated", what] = [*map(ask, sets[True][1:]), None]
    rows = []
    for (word, what), (seen, held_out, part) in trained.items():
        labels = np.bincount([line["labels"][what] for line in sets[True][1]])
        row = {"at": word, "what": what, "accuracy": seen, "held_out": held_out}
        rows.append(row | {"untrained": untrained[word, what][0], "chance": float(labels.max() / labels.sum()), "share": part})
    return rows


def main(argv=None):
    parser = environment.arguments(__doc__)
    parser.add_argument("source", help="a run's folder, or a model's")
    args = parser.parse_args(argv)
    sizes = dict(learn=500, test=200) if args.smoke else {}
    rows = rows_of(args.source, **sizes)
    environment.write_result(f"{args.output}/shapes_text_probe.json", rows)
    print(environment.table(rows, COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
