"""What a folder of conductances says to those who program them: its README."""

README = """# Conductances of a model's crossbar arrays

Written by hf_reram {version}: {what}.

All conductances are in µS, voltages in V, currents in µA, times in s, temperatures in K.

## What is where

`conductances.json` says which layers there are, how each lies on its array, how it is driven and read; under
`layers`, by name. Of a layer, `files` names

{files}

Layers whose `array` names another layer have no cells of their own: they share a weight, and its cells.

**Rows.** In the order in which they stand in the files: tile by tile (`tiles`), in a tile group by group, in a
group input channel by input channel, of a channel its kernel's elements (row by row of the kernel; 1 of a linear
layer), and of each as many copies as `row_copies` says of the input channel. All copies are driven alike. Groups
are those of a grouped convolution: each has rows of its own, and output channels of its own, `column` of group `g`
is output channel `g · columns + column`. Where a layer has one group, `column` is the output channel. Rows are
counted from 0.

**Columns.** Each output channel has `pairs_per_weight` pairs of columns, "plus" and "minus", whose currents are
subtracted. Tiles and groups have columns of their own.

## From an input to an output

For an input vector x of a layer (a token, or the window of an image that meets the array, padded as the digital
layer pads), with the layer's `input` and `output`:

1. `u = (x - offset) / scale`, of each input channel. A number stands for all channels.
2. `span` is `input.range`; where `input.kind` is "per_token" it is the largest magnitude of u over the token (over
   the whole image of a convolution, padding included). Where it is "uncalibrated" nothing is known of the inputs:
   calibrate the model first.
3. `u = clamp(u / span, input.lowest, 1)`{dac}.
4. The row is driven at `v = input.full_scale_V · u`.
5. A column's current is `I = Σ_rows g · v0_V · sinh(v / v0_V)`: of an ideal cell. A real one's is what it is.
6. Of each tile, `D = mean over pairs of (I_plus - I_minus)`{adc}.
7. `y = Σ_tiles D · output.per_uA · span · weight_scale + bias`, with `weight_scale` of the output channel, or of
   output channel and tile. `bias` is digital, and holds what makes up for the inputs' offset.

## Back

Put what was read from the cells into the files of this folder, in the same places: either into the safetensors
files or into the CSV files; delete the others. In `conductances.json` set `origin` to "measured", `time` to the
seconds since programming and `temperature` to the kelvins when it was read ("1d" and "85C" are allowed, too), and
`array` to the array's name; leave the rest as it is. Then

    with hf_reram.deploy(model, conductances="this folder"):
        ...

and `hf_reram.evaluate_robustness(..., conductances=["this folder"])`, or `hf-reram eval MODEL --conductances "this
folder"`, take the array in place of a simulated chip. They refuse

- a folder of another model, of other weights, another calibration or other hardware, or whose `layers` were edited;
- conductances that are missing, NaN or infinite, or above {most:g} times g_max;
- negative ones, but for up to {negative:g} % of a layer's cells, and at least one, that are below 0 by no more than
  {negative:g} % of g_max - g_min, as instruments read of cells that hardly conduct: these are taken as 0, and counted
  in a warning and in the report;
- tiles that are said to be measured and are as they were exported: all their cells bit for bit, or more than
  {share:g} % of them within five digits. Cells that were exported at g_min or 0 do not count;
- tiles in mS or S.

A warning and the report name tiles that hardly hold what they were to hold: of the differences g_plus - g_minus, the
correlation with those that were exported as targets, or by which multiple of these they are, is less than {alike:g} of
what the device's cells have at the stated time and temperature, or the multiple is more than {most_alike:g} times that,
beyond {errors:g} standard errors of a tile of its size. Retention, programming errors and defects of the device are in
what is expected; tiles that were swapped, of swapped polarity, empty or three times too high are beyond.
"""
