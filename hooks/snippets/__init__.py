"""The code on the pages: which fences there are, what is wrong with them, and whether each runs alone.

reading.py   the fences of a page
judging.py   what can be seen to be wrong with one without running it
alone.py     each fence as a file of its own, run by itself
captions.py  the numbers in a figure's words, each computed or asserted by its code
"""
