"""What a step costs in time, memory and money: hardware, models, operators, collectives.

Takes arrays (messages per link, picks and distinct experts per GPU), never a plan or a trace.
"""
