"""The scenes of Causal3DIdent in Blender's Cycles: built once, set to an image's latents, rendered.

How an image costs less than with --plain. The scene is built once, and an image moves and colours objects without touching
meshes or shaders. Every mesh has a second, parked user, so that Cycles keeps it and its BVH as an instance when it moves.
Light does not bounce, so that a picture is the sum of one picture for each lamp: rendered one by one, they lack the noise of
drawing at random, for every sample, the lamp that lights it, which is most of the noise at the object's edges. Of each lamp's
picture only the box is rendered that holds the object and its shadow, for the spotlight the object and the pool of light:
beyond it is empty ground, a linear function of its colour that is rendered once for each lamp and height of the ground.
Enough samples are not denoised: the denoiser takes time, and its bias is as large as their noise. A process a core, of one
thread each, runs side by side what does not scale with threads.
"""

import colorsys
import itertools
import math
from pathlib import Path

import bmesh
import bpy
import numpy as np
from mathutils import Euler, Matrix, Vector

from reading.causal3dident import ROTATIONS
from running.command_line import InputError

# Tubes that stand-ins are made of: turns around z, points of them, rise of a turn, radius of the tube, corners around it.
TUBES = {"ring": (1, 48, 0.0, 0.38, 20), "coil": (2.5, 100, 0.9, 0.22, 14)}
# Boxes that stand-ins are made of: (size, centre) along x, y and z.
BOXES = {
    "jack": [((2.0, 0.36, 0.36), (0, 0, 0)), ((0.36, 1.6, 0.36), (0, 0, 0)), ((0.36, 0.36, 1.2), (0, 0, 0))],
    "arch": [((1.8, 0.6, 0.5), (0, 0, 0.75)), ((0.5, 0.6, 1.5), (-0.65, 0, -0.25)), ((0.5, 0.6, 1.5), (0.65, 0, -0.25))],
}
OBJECT_SCALE, GROUND_SIZE = 1.5, 1500.0
SPOT_WATTS, SPOT_CONE, SPOT_BLEND, SPOT_RADIUS = 3000.0, math.radians(35), 0.1, 0.5
STANDIN_SIZE = 2.8  # largest dimension of a stand-in before it is scaled; the teapot's is 2.96, the cow's 2.70
PARKED = (0.0, 0.0, -1e4)  # below the ground: seen by nothing, shading nothing
GROUND_SAMPLES = 16  # smooth and without shadows, it has hardly any noise
BOX_MARGIN = 2  # pixels around what is computed: the pixel filter reaches 0.75 pixels
DENOISED_BELOW = 64  # samples: from here on the denoiser gains at most 0.3 dB, for a quarter of the time


def assign(target, **values):
    """Set several properties of something of Blender's."""
    for name, value in values.items():
        setattr(target, name, value)


def add(name, data):
    """New object of the scene, of a mesh, a lamp or a camera."""
    item = bpy.data.objects.new(name, data)
    bpy.context.scene.collection.objects.link(item)
    return item


def clear_scene():
    """A scene with the camera and the two lamps of the base scene, and nothing else; returns the material's node group."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.context.scene.camera = camera = add("Camera", bpy.data.cameras.new("Camera"))
    camera.data.lens, camera.data.sensor_width, camera.location = 35.0, 50.0, (8.0, 0.0, 8.0)
    camera.rotation_euler = (-camera.location).to_track_quat("-Z", "Y").to_euler()
    area = add("LightStatic", bpy.data.lights.new("LightStatic", "AREA"))
    area.data.energy, area.data.size, area.location = 39.27, 1.0, (0.0, 0.0, 7.0)
    sun = add("LightDynamic", bpy.data.lights.new("LightDynamic", "SUN"))
    sun.data.energy, sun.data.angle = 0.5, 0.2
    group = bpy.data.node_groups.new("Rubber", "ShaderNodeTree")
    group.interface.new_socket("Shader", in_out="OUTPUT", socket_type="NodeSocketShader")
    group.interface.new_socket("Color", in_out="INPUT", socket_type="NodeSocketColor")
    inputs, outputs = group.nodes.new("NodeGroupInput"), group.nodes.new("NodeGroupOutput")
    kinds = ("BsdfDiffuse", "BsdfAnisotropic", "Fresnel", "MixShader")
    diffuse, gloss, fresnel, mix = (group.nodes.new(f"ShaderNode{kind}") for kind in kinds)
    gloss.inputs["Roughness"].default_value, fresnel.inputs["IOR"].default_value = 0.6, 1.2
    group.links.new(inputs.outputs["Color"], diffuse.inputs["Color"])
    for place, source in enumerate((fresnel, diffuse, gloss)):
        group.links.new(source.outputs[0], mix.inputs[place])
    group.links.new(mix.outputs[0], outputs.inputs["Shader"])
    return group


def bad_asset(file, what):
    """InputError about a file of the assets."""
    return InputError(f"{file} {what}; take it from a fresh clone of Multimodal3DIdent")


def load_base_scene(file, material):
    """The base scene in `file` without its ground; returns the node group Rubber of the file of the material."""
    try:
        bpy.ops.wm.open_mainfile(filepath=file)
    except RuntimeError as error:
        raise bad_asset(file, f"is damaged ({error})") from None
    if "Ground" not in bpy.data.objects or bpy.context.scene.camera is None:
        raise bad_asset(file, "has no Ground or no camera")
    bpy.data.objects.remove(bpy.data.objects["Ground"])
    return append(material, "node_groups", "Rubber")


def append(file, kind, name):
    """Data block `name` of a .blend file; InputError if it is not in there."""
    try:
        with bpy.data.libraries.load(file) as (source, target):
            if name in getattr(source, kind):
                setattr(target, kind, [name])
    except OSError as error:
        raise bad_asset(file, f"is damaged ({error})") from None
    if not getattr(target, kind):
        raise bad_asset(file, f"holds no {name}")
    return getattr(target, kind)[0]


def circle(count, turns=1):
    """`count` angles that divide so many turns."""
    return [2 * math.pi * turns * k / count for k in range(count)]


def standin_mesh(name):
    """Mesh of a stand-in shape, its largest dimension STANDIN_SIZE, its bounding box around the origin."""
    shape, rings = bmesh.new(), []
    if name in TUBES:
        turns, points, rise, radius, sides = TUBES[name]
        for a in circle(points, turns):
            centre = Vector((math.cos(a), math.sin(a), rise * (a / (2 * math.pi) - turns / 2)))
            outwards, up = Vector((centre.x, centre.y, 0.0)).normalized(), Vector((0, 0, 1))
            rings.append([centre + radius * (math.cos(b) * outwards + math.sin(b) * up) for b in circle(sides)])
    elif name == "star":
        corners = [(radius * math.cos(a), radius * math.sin(a)) for radius, a in zip((1.0, 0.42) * 5, circle(10), strict=True)]
        rings = [[(*corner, z) for corner in corners] for z in (-0.3, 0.3)]
    elif name == "cone":
        bmesh.ops.create_cone(shape, cap_ends=True, segments=48, radius1=1.0, radius2=0.0, depth=2.2)
    elif name == "monkey":
        bmesh.ops.create_monkey(shape)
        bmesh.ops.subdivide_edges(shape, edges=shape.edges[:], cuts=1, smooth=1.0, use_grid_fill=True)
    for size, centre in BOXES.get(name, ()):
        bmesh.ops.create_cube(shape, size=1.0, matrix=Matrix.Translation(centre) @ Matrix.Diagonal((*size, 1.0)))
    rings = [[shape.verts.new(corner) for corner in ring] for ring in rings]
    for here, there in itertools.pairwise([*rings, rings[0]] if name == "ring" else rings):
        for j, k in itertools.pairwise([*range(len(here)), 0]):
            shape.faces.new((here[j], there[j], there[k], here[k]))
    if rings and name != "ring":
        shape.faces.new(rings[0])
        shape.faces.new(reversed(rings[-1]))
    corners = np.array([vertex.co for vertex in shape.verts])
    low, high = corners.min(0), corners.max(0)
    for vertex in shape.verts:
        vertex.co = (vertex.co - Vector((low + high) / 2)) * (STANDIN_SIZE / (high - low).max())
    bmesh.ops.recalc_face_normals(shape, faces=shape.faces[:])
    mesh = bpy.data.meshes.new(name)
    shape.to_mesh(mesh)
    shape.free()
    if name in ("ring", "coil", "monkey"):
        mesh.shade_smooth()
    return mesh


def rubber_material(name, group):
    """Material of the node group Rubber whose colour is the object's, so that a new colour leaves the shader alone."""
    material = bpy.data.materials.new(name)
    material.use_nodes = True
    tree = material.node_tree
    tree.nodes.clear()
    rubber, surface, color = (tree.nodes.new(f"ShaderNode{kind}") for kind in ("Group", "OutputMaterial", "ObjectInfo"))
    rubber.node_tree = group
    tree.links.new(color.outputs["Color"], rubber.inputs["Color"])
    tree.links.new(rubber.outputs["Shader"], surface.inputs["Surface"])
    return material


def build_scene(settings):
    """Scene of generate_images.render_settings: returns {object_shape: (object, its largest dimension)}, ground, spot."""
    assets = settings["assets"]
    group = load_base_scene(assets["scene"], assets["material"]) if assets else clear_scene()
    link = bpy.context.scene.collection.objects.link
    material = rubber_material("Object", group)
    shapes = {}
    for number, name in settings["shapes"]:
        shape = append(name, "objects", Path(name).stem) if assets else bpy.data.objects.new(name, standin_mesh(name))
        shape.data.materials.clear()
        shape.data.materials.append(material)
        shape.scale = [OBJECT_SCALE * factor for factor in shape.scale]
        shape.rotation_mode, shape.location = "XYZ", PARKED
        size = float((np.ptp([corner[:] for corner in shape.bound_box], axis=0) * np.array(shape.scale)).max())
        link(shape)
        link(shape.copy())  # a second user of the mesh: without it, Cycles rebuilds the BVH of a mesh that moves
        shapes[number] = shape, size
    half = GROUND_SIZE / 2
    plane = bpy.data.meshes.new("Plane")
    plane.from_pydata([(-half, -half, 0), (half, -half, 0), (half, half, 0), (-half, half, 0)], [], [(0, 1, 2, 3)])
    plane.materials.append(rubber_material("Plane", group))
    ground, spot = add("Plane", plane), add("Spot", bpy.data.lights.new("Spot", "SPOT"))
    assign(spot.data, energy=SPOT_WATTS, spot_size=SPOT_CONE, spot_blend=SPOT_BLEND, shadow_soft_size=SPOT_RADIUS)
    set_up_cycles(settings)
    return shapes, ground, spot


def set_up_cycles(settings):
    """Set the scene's renderer: no bounces, sampling and denoising, device and threads."""
    scene, size, plain = bpy.context.scene, settings["size"], settings["plain"]
    render, cycles = scene.render, scene.cycles
    assign(render, engine="CYCLES", resolution_x=size, resolution_y=size, resolution_percentage=100, dither_intensity=0.0)
    assign(render, use_compositing=False, use_sequencer=False, use_file_extension=False, use_persistent_data=not plain)
    assign(render, threads_mode="FIXED", threads=settings["threads"])
    assign(render.image_settings, file_format="PNG", color_mode="RGB", color_depth="8")
    scene.view_settings.view_transform = "Standard"
    scene.world = scene.world or bpy.data.worlds.new("World")
    scene.world.use_nodes = True
    for node in scene.world.node_tree.nodes:
        if node.bl_idname == "ShaderNodeBackground":
            node.inputs["Strength"].default_value = 0.0
    for name in ("max", "diffuse", "glossy", "transmission", "volume", "transparent_max"):
        setattr(cycles, f"{name}_bounces", 0)
    cycles.samples = settings["samples"]
    cycles.use_denoising = settings["denoise"] and (plain or cycles.samples < DENOISED_BELOW)
    if cycles.use_denoising:
        try:
            cycles.denoiser = "OPENIMAGEDENOISE"
        except TypeError:
            raise InputError(
                f"this Blender was built without OpenImageDenoise, which --plain and fewer than {DENOISED_BELOW} samples need; "
                f"use --samples {DENOISED_BELOW} or more, or Blender's own build, or `make blender`"
            ) from None
        cycles.denoising_input_passes = "RGB_ALBEDO_NORMAL"
        # Albedo and normals of a scene without textures are free of noise but for edges: nothing to filter beforehand.
        cycles.denoising_prefilter, cycles.denoising_quality = ("ACCURATE", "HIGH") if plain else ("NONE", "BALANCED")
    cycles.use_adaptive_sampling = False  # more noise at equal time: it ends a pixel's samples amid a Sobol block
    cycles.use_light_tree = cycles.use_auto_tile = False
    if not plain:
        cycles.sampling_pattern = "TABULATED_SOBOL"  # the automatic one depends on what was rendered before
    if settings["device"] != "cpu":
        preferences = bpy.context.preferences.addons["cycles"].preferences
        kind = settings["device"].upper()
        try:
            preferences.compute_device_type = kind
        except TypeError:
            raise InputError(f"this Blender was built without {kind}; use --device cpu") from None
        preferences.refresh_devices()
        for device in preferences.devices:
            device.use = device.type == kind
        if not any(device.use for device in preferences.devices):
            raise InputError(f"Cycles finds no {kind} device; check the driver, or use --device cpu")
        cycles.device = "GPU"
        cycles.denoising_use_gpu = True


def hue(latent, protocol):
    """Hue of the ground or the spotlight: (latent − ½)/2, between −¼ and ¼.

    protocol: paper wraps hues below 0 into [0, 1], code leaves them to colorsys, which gives them one component above or below
    the others' range (Blender takes what is below 0 for 0). The published data set's mean and standard deviation over pixels
    are nearer to the latter's: 0.433 0.269 0.284, 0.120 0.146 0.108; unwrapped, 48 images of the real base scene have
    0.432 0.284 0.276, 0.114 0.124 0.061, wrapped 0.432 0.320 0.298, 0.114 0.089 0.078.
    """
    unwrapped = (latent - 0.5) / 2
    return unwrapped % 1.0 if protocol == "paper" else unwrapped


def set_latents(shapes, ground, spot, latents, protocol="code"):
    """Move and colour what the latents of one image say; the object of the last image is parked."""
    shape, size = shapes[latents["object_shape"]]
    for other, _ in shapes.values():
        if other is not shape and tuple(other.location) != PARKED:
            other.location = PARKED
    shape.location = (3.0 * latents["object_ypos"] - 3.0, 3.0 * latents["object_xpos"] - 3.0, 0.0)
    shape.rotation_euler = Euler(math.pi * latents[name] - math.pi / 2 for name in ROTATIONS)
    shape.color = (*colorsys.hsv_to_rgb(latents["object_color"], 1.0, 1.0), 1.0)
    ground.location.z = -size
    ground.color = (*colorsys.hsv_to_rgb(hue(latents["background_color"], protocol), 0.6, 1.0), 1.0)
    phi = math.pi * latents["spotlight_pos"] - math.pi / 2
    spot.location = (4.0 * math.sin(phi), 4.0 * math.cos(phi), 6.0 + size)
    spot.rotation_euler = (shape.location - Vector(spot.location)).to_track_quat("-Z", "Y").to_euler()
    spot.data.color = colorsys.hsv_to_rgb(hue(latents["spotlight_color"], protocol), 0.8, 1.0)


def hull(shape):
    """(V, 3) corners of the convex hull of an object's mesh, in its own coordinates."""
    solid = bmesh.new()
    bpy.context.view_layer.update()
    solid.from_object(shape, bpy.context.evaluated_depsgraph_get())
    found = bmesh.ops.convex_hull(solid, input=solid.verts)["geom"]
    corners = np.array([vertex.co[:] for vertex in found if isinstance(vertex, bmesh.types.BMVert)])
    solid.free()
    return corners


def cone(half, count=32):
    """(count, 3) rays whose hull holds all rays from −z by at most the angle `half`, in radians."""
    angles, radius = 2 * np.pi * np.arange(count) / count, math.tan(half) / math.cos(math.pi / count)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles), np.full(count, -1.0)], 1)


def on_plane(starts, rays, height):
    """(M, 3) points where rays from `starts`, both (…, 3), meet the plane z = height; None if one of them goes up."""
    if rays[..., 2].max() > -1e-6:
        return None
    return (starts + rays * ((height - starts[..., 2]) / rays[..., 2])[..., None]).reshape(-1, 3)


def shadow(corners, lamp, height):
    """(M, 3) points of z = height whose hull holds the shadow of the hull of (V, 3) corners of the world; None if unbounded."""
    matrix, data = np.array(lamp.matrix_world), lamp.data
    if data.type == "SUN":
        return on_plane(corners[:, None], cone(data.angle / 2) @ matrix[:3, :3].T, height)
    if data.type == "AREA":
        wide = (data.size, data.size_y if data.shape in ("RECTANGLE", "ELLIPSE") else data.size, 0)
    else:  # POINT and SPOT: a ball
        wide = 3 * (2 * data.shadow_soft_size,)
    source = np.array(list(itertools.product((-0.5, 0.5), repeat=3))) * wide
    return on_plane(corners[:, None], corners[:, None] - (source @ matrix[:3, :3].T + matrix[:3, 3]), height)


def pool(spot, height):
    """(M, 3) points of the plane z = height whose hull contains all that a spotlight lights; None if it has no bounds.

    The lamp is a ball, whose points all have the cone: they lie in that cone moved back by radius / sin(half its angle).
    """
    matrix, half = np.array(spot.matrix_world), spot.data.spot_size / 2
    apex = matrix[:3, 3] + matrix[:3, 2] * spot.data.shadow_soft_size / math.sin(half)
    return on_plane(apex, cone(half) @ matrix[:3, :3].T, height)


def pixel_box(points):
    """(left, right, bottom, top): pixels that the hull of (M, 3) points may touch; all of them for None or behind the camera."""
    size, camera = bpy.context.scene.render.resolution_x, bpy.context.scene.camera
    if points is None:
        return 0, size, 0, size
    projection = camera.calc_matrix_camera(bpy.context.evaluated_depsgraph_get(), x=size, y=size)
    view = np.array(projection @ camera.matrix_world.inverted())
    seen = np.pad(points, ((0, 0), (0, 1)), constant_values=1.0) @ view.T
    if seen[:, 3].min() < 1e-3:
        return 0, size, 0, size
    places = (seen[:, :2] / seen[:, 3:] + 1) / 2 * size
    low = np.clip(np.floor(places.min(0)).astype(int) - BOX_MARGIN, 0, size - 1)
    high = np.clip(np.ceil(places.max(0)).astype(int) + BOX_MARGIN, low + 1, size)
    return int(low[0]), int(high[0]), int(low[1]), int(high[1])


def radiance(file):
    """(H, W, 4) float32: the scene rendered, linear, its rows from the bottom; by way of `file`, which is left."""
    render = bpy.context.scene.render
    render.filepath = file
    assign(render.image_settings, file_format="OPEN_EXR", color_depth="32", exr_codec="NONE")
    bpy.ops.render.render(write_still=True)
    image = bpy.data.images.load(file)
    pixels = np.empty((image.size[1], image.size[0], 4), np.float32)
    image.pixels.foreach_get(pixels.ravel())
    bpy.data.images.remove(image)
    return pixels


class LampByLamp:
    """Renders pictures as the sum of one for each lamp, each of them only where it is not empty ground.

    scene: what `build_scene` made of the settings. Half of a pixel's samples are the spotlight's, the rest the other lamps'.
    """

    def __init__(self, scene, settings):
        self.scene, self.protocol, self.kept = scene, settings["protocol"], {}
        spot, half = scene[2], settings["samples"] // 2
        others = [item for item in bpy.context.scene.objects if item.type == "LIGHT" and item is not spot]
        self.lamps = [(spot, spot.data.energy, max(1, half))]
        self.lamps += [(lamp, lamp.data.energy, max(1, half // len(others))) for lamp in others]

    def light(self, lamp):
        """Turn off all lamps but one."""
        for item, energy, _ in self.lamps:
            item.data.energy = energy if item is lamp else 0.0

    def empty_ground(self, number, file):
        """[(black, gain)] of each lamp but the spotlight, (H, W, 4) radiances: of a black ground at the height that a shape's
        has, and what a white one adds to it. The object is out of sight then; `file` is overwritten.
        """
        shapes, ground, _ = self.scene
        cycles = bpy.context.scene.cycles
        denoised, cycles.use_denoising, bpy.context.scene.render.use_border = cycles.use_denoising, False, False
        cycles.samples, cycles.seed = GROUND_SAMPLES, 0
        for shape, _ in shapes.values():
            shape.location = PARKED
        ground.location.z = -shapes[number][1]
        parts = []
        for lamp, _, _ in self.lamps[1:]:
            self.light(lamp)
            ground.color = (0.0, 0.0, 0.0, 1.0)
            black = radiance(file)
            ground.color = (1.0, 1.0, 1.0, 1.0)
            parts.append((black, radiance(file) - black))
        cycles.use_denoising = denoised
        return parts

    def render(self, image):
        """Write the picture of an image (a dict, see `Renderers.render`) to its temporary file."""
        shapes, ground, spot = self.scene
        cycles, render = bpy.context.scene.cycles, bpy.context.scene.render
        number, file = image["latents"]["object_shape"], image["temporary"]
        if number not in self.kept:
            self.kept[number] = hull(shapes[number][0]), self.empty_ground(number, file)
        corners, grounds = self.kept[number]
        set_latents(*self.scene, image["latents"], self.protocol)
        bpy.context.view_layer.update()
        matrix, height, color = np.array(shapes[number][0].matrix_world), ground.location.z, np.array(ground.color)
        corners = corners @ matrix[:3, :3].T + matrix[:3, 3]
        size, total = render.resolution_x, 0.0
        for k, (lamp, _, samples) in enumerate(self.lamps):
            reached = pool(spot, height) if lamp is spot else shadow(corners, lamp, height)
            box = pixel_box(None if reached is None else np.concatenate([corners, reached]))
            edges = ("border_min_x", "border_max_x", "border_min_y", "border_max_y")
            # Blender rounds down to whole pixels.
            places = {name: (edge + 0.25) / size for name, edge in zip(edges, box, strict=True)}
            assign(render, use_border=True, use_crop_to_border=False, **places)
            self.light(lamp)
            cycles.samples, cycles.seed = samples, (image["seed"] + 1013904223 * k) % 2**31  # noise of its own
            pixels = radiance(file)
            inside = slice(box[2], box[3]), slice(box[0], box[1])
            part = np.zeros_like(pixels) if lamp is spot else grounds[k - 1][0] + grounds[k - 1][1] * color
            part[inside] = pixels[inside]
            total = total + part
        total[..., 3] = 1.0
        picture = bpy.data.images.new("Picture", size, size, float_buffer=True)
        picture.pixels.foreach_set(total.astype(np.float32).ravel())
        assign(render.image_settings, file_format="PNG", color_depth="8")
        picture.save_render(file, scene=bpy.context.scene)  # with the scene's view transform
        bpy.data.images.remove(picture)
