"""What a model said → what the guest runs. Pure: nothing here opens, waits or knows of envs.

`uitars.parse` reads a prediction into typed actions, `pyautogui.steps` turns them into programs, and
`dialogue.Dialogue` keeps the conversation that trainers are shown.
"""
