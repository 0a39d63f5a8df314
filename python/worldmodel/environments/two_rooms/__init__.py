"""Two rooms: a dot, a wall with a door, and a goal behind it.

moves     layouts of walls and doors, and moves that stop where they meet a wall
walks     the published exploration: walks through the rooms, starts and goals
pictures  observations and drawings
game      gymnasium environments: TwoRooms, and TurnedRooms, whose commands are turned by a hidden angle
"""
