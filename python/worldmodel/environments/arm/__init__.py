"""A planar arm with three joints and a gripper: pick, push, stack, wipe.

body      joints, hand and fingers
worlds    blocks, dirt, an obstacle, contact and tasks, many arms at once
expert    a scripted expert, whose detour around the obstacle has two modes
pictures  pictures of any size
game      the gymnasium environment
"""
